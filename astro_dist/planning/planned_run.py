"""A run as it is planned: what every forecast of its time, memory and disk begins with."""

import dataclasses
from collections.abc import Mapping

import torch

from astro_dist.config.schema import RunConfig
from astro_dist.planning.units import Plan

__all__ = ["PlannedRun"]


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run that is yet to be done, or is being done.

    Attributes:
        plan: Units of the run.
        config: Configuration of the run.
        chunk_tokens: Number of tokens of each chunk by name, in the order in which the chunks travel.
        dtype: Dtype of forward passes.
        device_type: Type of the device, "cpu" or "cuda".
    """

    plan: Plan
    config: RunConfig
    chunk_tokens: Mapping[str, int]
    dtype: torch.dtype
    device_type: str
