"""What corrections of low rank take, foretold from shapes: their weights, and the work to compute them."""

import dataclasses
from collections.abc import Iterable

from rich.filesize import decimal

from astro.activation_config import Activations, Reconstruction
from astro.errors import ConfigError
from astro.model.low_rank import takes_correction
from astro.quantization.error_reconstruction import subspace_work
from astro_dist.config.schema import RunConfig
from astro_dist.planning.predicted_groups import PredictedInputGroup
from astro_dist.planning.solve_cost import dequantizing
from astro_dist.planning.units import BlockUnit, Plan
from astro_dist.planning.work import Work
from astro_dist.wording import percent

__all__ = [
    "CorrectionSize",
    "correction_notes",
    "correction_size",
    "correction_work",
    "held_channel_notes",
    "rounding_drifts",
]

_STORED_BYTES = 2
"""Bytes of a weight of a correction, in a model of 16 bits."""


@dataclasses.dataclass(frozen=True)
class CorrectionSize:
    """How large the corrections of some blocks are, or at most are where the rank is chosen in the run.

    Attributes:
        num_layers: Number of layers that get a correction.
        weights: Weights of all corrections, which is also the number of multiplications that they take a token.
        layer_weights: Weights of the layers that are corrected.
        num_experts: Number of quantized layers that get none, because they are experts'.
    """

    num_layers: int
    weights: int
    layer_weights: int
    num_experts: int

    @property
    def size_bytes(self) -> int:
        """Size of the corrections in a file, in bytes."""
        return _STORED_BYTES * self.weights


def rounding_drifts(config: RunConfig, is_corrected: bool = True) -> int:
    """Count the matrices of columns × columns that are summed of what rounding takes from the inputs of a layer.

    What weights make up for and corrections that mind rounding share one, and such corrections want a second.

    Args:
        config: Configuration of the run.
        is_corrected: Whether the layer gets a correction, if any does; experts get none.
    """
    minds = is_corrected and config.reconstruction.minds_rounding(config.activations)
    return int(minds or config.quantization.makes_up_for_rounding(config.activations.bits)) + minds


def correction_size(blocks: Iterable[BlockUnit], settings: Reconstruction) -> CorrectionSize:
    """Count what the corrections of some blocks hold.

    Args:
        blocks: The blocks.
        settings: Rank of the corrections.
    """
    linears = [linear for unit in blocks for linear in unit.linears]
    corrected = [linear for linear in linears if settings.is_on and takes_correction(linear)]
    rank = settings.most_rank
    return CorrectionSize(
        num_layers=len(corrected),
        weights=sum(min(rank, layer.rows, layer.columns) * (layer.rows + layer.columns) for layer in corrected),
        layer_weights=sum(layer.rows * layer.columns for layer in corrected),
        num_experts=len(linears) - len(corrected) if settings.is_on else 0,
    )


def correction_notes(plan: Plan, settings: Reconstruction) -> list[str]:
    """Say how large the corrections of a run are, and which layers get none.

    Args:
        plan: Units of the run.
        settings: Rank of the corrections.

    Raises:
        ConfigError: No layer gets a correction.
    """
    if not settings.is_on:
        return []
    size = correction_size(plan.blocks, settings)
    if not size.num_layers:
        raise ConfigError(
            "reconstruction.rank: no quantized layer can have a correction, experts have none; set it to 0, or see "
            "what quantization.ignore leaves out"
        )
    limit = "at most " if settings.rank == "auto" else ""
    notes = [
        f"reconstruction.rank {settings.rank}: {size.num_layers} layers get a correction of low rank, {limit}"
        f"{decimal(size.size_bytes)} in all, and {percent(size.weights / size.layer_weights, 1)} more "
        "multiplications a token in these layers; servers add them only if they are told to load the folder `adapter` "
        "of the model as a LoRA adapter"
    ]
    if size.num_experts:
        notes.append(
            f"reconstruction: {size.num_experts} layers of experts get no correction: transformers holds the experts "
            "of a layer in one parameter, for which PEFT has no adapter by expert"
        )
    return notes


def held_channel_notes(settings: Reconstruction, activations: Activations) -> list[str]:
    """Say what becomes of the weights of outlier channels, which ASER's smoothing makes larger.

    Args:
        settings: Rank of the corrections.
        activations: What is done to inputs.
    """
    if activations.smoothing != "aser":
        return []
    channels = activations.outlier_channels
    if settings.holds_channels(activations):
        return [
            f"activations.smoothing aser: corrections alone hold the weights of the {channels} outlier channels of "
            "each smoothed input, and the grids of layers need not reach them"
        ]
    return [
        f"activations.smoothing aser without corrections of rank {channels} or more: weights of outlier channels "
        "become larger, and with them the scales of the weights beside them, which can cost more than it saves; set "
        f"reconstruction.rank to at least activations.outlier_channels: {channels}, or take smoothing: smoothquant"
    ]


def correction_work(
    batch: PredictedInputGroup, settings: Reconstruction, compensated: bool, minds_rounding: bool = False
) -> Work:
    """Count what it takes to correct all rows of a batch; experts are not corrected.

    Args:
        batch: The batch.
        settings: Rank of the corrections.
        compensated: Whether layers make up for errors made before them.
        minds_rounding: Whether corrections mind that their layers read rounded inputs.
    """
    if not settings.is_on or batch.reach < 1:
        return Work()
    rank = settings.most_rank
    product = float(batch.columns * batch.weights)
    # One half of a product with the Hessian for the error before and after each, and three for what was aimed at.
    measured, aimed = 2.0 * product, 6.0 * product * compensated
    if minds_rounding:  # a factor, three products, and a solve with both halves of the factor
        aimed += batch.square * batch.columns / 3.0 + 8.0 * product
    found = batch.count * subspace_work(batch.rows, batch.columns, rank)
    return Work(exact=measured + aimed + found) + dequantizing(batch.weights)
