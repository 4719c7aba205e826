"""The dtype of a run's forward passes."""

import torch

from astro.storage.checkpoint import Checkpoint
from astro_dist.config.schema import RunConfig
from astro_dist.planning.units import Plan

__all__ = ["compute_dtype"]


def compute_dtype(config: RunConfig, plan: Plan, checkpoint: Checkpoint, device: str) -> torch.dtype:
    """Return the dtype of forward passes.

    Args:
        config: Configuration of the run.
        plan: Units of the run.
        checkpoint: Opened checkpoint, whose dtype is taken where the configuration leaves the choice.
        device: Type of the device, "cpu" or "cuda".
    """
    if config.execution.compute_dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.execution.compute_dtype)
        return dtype
    key = next(linear.key for unit in plan.blocks for linear in unit.linears)
    stored = checkpoint.entries[key].float_dtype or torch.float32
    # CPUs have no float16 arithmetic worth the name: float32 is exact for such weights, and faster.
    return torch.float32 if stored == torch.float16 and device == "cpu" else stored
