"""How the layers of a block are quantized, from what the worker was built from: a recipe, and what that asks to sum."""

from collections.abc import Sequence

import torch

from astro.calibration.input_sums import SumKind
from astro.formats import LAYOUTS
from astro.model.low_rank import takes_correction
from astro.model.operands import Operand
from astro.model.smoothed_tensors import SmoothedInput
from astro.quantization.recipe import Corrections, Recipe
from astro_dist.planning.units import BlockUnit
from astro_dist.worker.spec import WorkerSpec

__all__ = ["block_recipe", "measured_widths", "stored_dtype", "sum_kind"]


def block_recipe(spec: WorkerSpec, unit: BlockUnit, inputs: Sequence[SmoothedInput] = ()) -> Recipe:
    """Return how a block's layers are quantized.

    Scales are stored in the layout's dtype, or, where it has none, in that of the block's weights in the source.
    Corrections have 16 bits: in that dtype too, or in bfloat16 where the source has float32.

    Args:
        spec: What the worker was built from.
        unit: Unit of the block.
        inputs: How the inputs of its layers are smoothed.
    """
    layout_dtype: torch.dtype | None = LAYOUTS[spec.quantization.format].SCALE_DTYPE
    scale_dtype = layout_dtype if layout_dtype is not None else stored_dtype(spec, unit)
    corrections = None
    if spec.reconstruction.is_on:
        layers = frozenset(linear.name for linear in unit.linears if takes_correction(linear))
        stored = stored_dtype(spec, unit)
        dtype = stored if stored.itemsize == 2 else torch.bfloat16  # which has the range of float32
        wants_rounded = spec.activations.has_clips and not spec.quantization.makes_up_for_rounding(
            spec.activations.bits
        )
        columns = {}
        if spec.reconstruction.holds_channels(spec.activations):
            # Of an input that experts read too, which have no corrections, nothing is held; nor is it of one whose
            # channels are more than there is rank for, because heads share even the one row that makes them.
            columns = {
                name: each.columns.indices
                for each in inputs
                if layers.issuperset(each.layers) and len(each.columns.indices) <= spec.reconstruction.most_rank
                for name in each.layers
            }
        corrections = Corrections(spec.reconstruction, layers, dtype, wants_rounded, columns)
    return Recipe(spec.quantization, spec.regularization, scale_dtype, spec.tile_elements, corrections)


def sum_kind(spec: WorkerSpec, operand: Operand, has_drift: bool = False) -> SumKind:
    """Return what is summed of the inputs of an operand over the calibration tokens.

    Errors made before experts are not compensated, because the tokens that reach one are not the same in the source
    model. What rounding does to the inputs that do reach it is, but by no correction, which experts do not have.

    Args:
        spec: What the worker was built from.
        operand: The operand.
        has_drift: Whether the drift from the source is summed outside experts.
    """
    is_expert = operand.expert is not None
    return SumKind(
        operand.grid(spec.activations.scheme),
        has_drift and not is_expert,
        has_rounding_drift=spec.quantization.makes_up_for_rounding(spec.activations.bits),
        has_correction_drift=spec.reconstruction.minds_rounding(spec.activations) and not is_expert,
    )


def measured_widths(spec: WorkerSpec, round_index: int) -> tuple[int, ...]:
    """Return the widths that a round measures besides: only the first measures, if there is a width budget.

    Args:
        spec: What the worker was built from.
        round_index: Index of the round.
    """
    return spec.quantization.bit_choices if spec.quantization.bits == "auto" and round_index == 0 else ()


def stored_dtype(spec: WorkerSpec, unit: BlockUnit) -> torch.dtype:
    """Return the dtype of a block's weights in the source; without quantized layers, that of forward passes.

    Args:
        spec: What the worker was built from.
        unit: Unit of the block.
    """
    dtypes = [spec.checkpoint.entries[linear.key].float_dtype for linear in unit.linears]
    return dtypes[0] or spec.compute_dtype if dtypes else spec.compute_dtype
