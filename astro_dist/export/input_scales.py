"""The file of a finished model with the learned grids of its layers' inputs, in the form of compressed-tensors.

For each packed layer `NAME.input_scale` and `NAME.input_zero_point`, float32 [1]. See `InputClips` for what they mean.
"""

from collections.abc import Iterable, Mapping

import torch

from astro.errors import CheckpointError
from astro.model.clipped_rounding import InputClips
from astro.model.linear_layer import LinearLayer
from astro.storage.atomic import save_tensors
from astro.storage.checkpoint import Checkpoint
from astro_dist.planning.units import Plan
from astro_dist.run_directory.records import RunDirectory

__all__ = ["INPUT_SCALES_NAME", "read_input_scales", "write_input_scales"]

INPUT_SCALES_NAME = "input-scales.safetensors"
"""Name of the file in the model's folder."""
_SCALE, _ZERO_POINT = "input_scale", "input_zero_point"


def write_input_scales(plan: Plan, run: RunDirectory) -> list[str]:
    """Write the learned grids of all quantized layers.

    Args:
        plan: Units of the run, whose layers have clips.
        run: Run directory.

    Returns:
        Names of the tensors.
    """
    numbers: dict[str, float] = {}
    for linear in (linear for unit in plan.blocks for linear in unit.linears):
        assert linear.clips is not None, f"{linear.name} has no clips"
        numbers |= dict(zip(_names(linear), (linear.clips.scale, linear.clips.zero_point), strict=True))
    tensors = {name: torch.tensor([number], dtype=torch.float32) for name, number in numbers.items()}
    save_tensors(run.model / INPUT_SCALES_NAME, tensors)
    return list(tensors)


def read_input_scales(checkpoint: Checkpoint, layers: Iterable[LinearLayer], bits: int) -> Mapping[str, InputClips]:
    """Read the learned grids of packed layers, by the layer's name.

    Args:
        checkpoint: Checkpoint of the model.
        layers: The packed layers.
        bits: Width of the inputs.

    Raises:
        CheckpointError: A layer has no such tensor, or one that is not one number, or a scale that is not positive.
    """
    layers = list(layers)
    lacking = [name for layer in layers for name in _names(layer) if name not in checkpoint.entries]
    if lacking:
        raise CheckpointError(f"{checkpoint.store}: {lacking[0]} is missing: config.json says inputs are rounded so")
    read = checkpoint.read([name for layer in layers for name in _names(layer)])
    for name, tensor in read.items():
        is_bad = tensor.numel() != 1 or (name.endswith(_SCALE) and not float(tensor) > 0)
        if is_bad:
            raise CheckpointError(f"{checkpoint.store}: {name} should be one number (a scale above 0), got {tensor}")
    return {layer.name: InputClips(bits, *(float(read[name]) for name in _names(layer))) for layer in layers}


def _names(linear: LinearLayer) -> tuple[str, str]:
    """Names of the scale and of the zero point of a layer."""
    return f"{linear.stem}{linear.joint}{_SCALE}", f"{linear.stem}{linear.joint}{_ZERO_POINT}"
