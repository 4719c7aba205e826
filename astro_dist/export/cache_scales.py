"""The file of a finished model with the scales of its cache: one of keys and one of values for each attention.

Servers look for them under the names that attention has in the checkpoint, `....self_attn.k_scale` and `.v_scale`.
"""

import torch

from astro.errors import CheckpointError, RunError
from astro.model.kv_cache import caching_modules
from astro.model.skeleton import Skeleton
from astro.storage.atomic import save_tensors
from astro.storage.checkpoint import Checkpoint
from astro_dist.planning.units import BlockUnit, Plan
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.unit_record import BlockResult
from astro_dist.schedule.names import block_unit

__all__ = ["CACHE_SCALES_NAME", "SCALE_NAMES", "checked_cache_scales", "write_cache_scales"]

CACHE_SCALES_NAME = "kv-cache-scales.safetensors"
"""Name of the file in the model's folder."""
SCALE_NAMES = ("k_scale", "v_scale")
"""Last parts of the names of the tensors."""


def write_cache_scales(plan: Plan, run: RunDirectory) -> list[str]:
    """Write the scales that calibration measured in the last round.

    Args:
        plan: Units of the run, all of them finished.
        run: Run directory.

    Returns:
        Names of the tensors.

    Raises:
        RunError: Calibration saw no keys and values at all, a record does not tell its scales, or an attention has no
            tensor in the checkpoint.
        DamagedError: The record of a block cannot be read.
    """
    tensors: dict[str, torch.Tensor] = {}
    for unit in plan.blocks:
        name = block_unit(run.rounds - 1, unit.index)
        for module, scales in run.read(name, BlockResult).require_cache_scales(name).items():
            stem = _stem_of(module, unit)
            for part, scale in zip(SCALE_NAMES, (scales.key, scales.value), strict=True):
                tensors[f"{stem}.{part}"] = torch.tensor([scale], dtype=torch.float32)
    if not tensors:
        raise RunError(f"{run.root}: calibration saw no keys and values, so that an FP8 cache has no scales")
    save_tensors(run.model / CACHE_SCALES_NAME, tensors)
    return list(tensors)


def checked_cache_scales(checkpoint: Checkpoint, skeleton: Skeleton) -> list[str]:
    """Return the names of the scales in a model whose config asks for an FP8 cache.

    Args:
        checkpoint: Checkpoint of the model.
        skeleton: The model on the meta device.

    Raises:
        CheckpointError: An attention module has no scale of its keys or values, or one that is not a positive number.
    """
    names = sorted(key for key in checkpoint.entries if key.endswith(tuple(f".{name}" for name in SCALE_NAMES)))
    for name, scale in checkpoint.read(names).items():
        if scale.numel() != 1 or not float(scale) > 0:
            raise CheckpointError(f"{checkpoint.store}: {name} should be one positive number, got {scale.tolist()}")
    stored = {skeleton.target_of(name)[0] for name in names}
    for index, block in enumerate(skeleton.blocks):
        caching = caching_modules(block)
        for module_name, module in block.named_modules(prefix=f"{skeleton.blocks_name}.{index}"):
            lacking = [name for name in SCALE_NAMES if f"{module_name}.{name}" not in stored]
            if module in caching and lacking:
                raise CheckpointError(
                    f"{checkpoint.store}: {module_name} has no {lacking[0]}, and config.json asks for an FP8 cache "
                    "(kv_cache_scheme): servers would take 1 for it"
                )
    return names


def _stem_of(module: str, unit: BlockUnit) -> str:
    """Name an attention module as the checkpoint does, by one of its tensors."""
    part = f".{module.rpartition('.')[2]}."
    key = next((key for key in unit.keys if part in key), None)
    if key is None:
        raise RunError(f"{module}: block {unit.index + 1} of the checkpoint has no tensor of it")
    return key[: key.index(part) + len(part) - 1]
