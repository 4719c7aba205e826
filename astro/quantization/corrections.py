"""The corrections of low rank of the layers of input groups, from the errors that the solve left.

Every member of an input group gets factors of its own, as PEFT stores them and servers compute them, so that none of
its rank is spent on the errors of the others. Where inputs are rounded to few bits, corrections also make up for what
they can of that, see `unrounded_inputs`. Shapes: B input groups side by side, R rows of a member, C columns.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from astro.errors import NumericalError
from astro.linalg.symmetric import squared_error
from astro.linalg.tiling import row_tiles
from astro.model.low_rank import LowRank
from astro.quantization.compensation import behind_errors, compensate
from astro.quantization.error_reconstruction import reconstruct, remaining_errors
from astro.quantization.grid import QuantizedLinear
from astro.quantization.held_columns import held_columns
from astro.quantization.layer_record import LayerRecord
from astro.quantization.output_error import sampled_errors
from astro.quantization.prepared_groups import InputGroups
from astro.quantization.unrounded_inputs import UnroundedInputs
from astro.timing import add_seconds, timed

__all__ = ["CorrectedGroups", "correct_input_groups", "with_corrections"]


@dataclasses.dataclass(frozen=True)
class CorrectedGroups:
    """Corrections of the layers of input groups, and what they leave.

    Attributes:
        corrections: Correction of each layer that gets one, by its name.
        taken: Squared output error that the corrections took from each input group, by its name.
        seconds: Time by phase that each input group took, by its name.
        whole: Squared output error without corrections, and the energy that it is relative to, of each input group of
            which corrections hold columns, by its name. The solve has measured both without these columns.
    """

    corrections: Mapping[str, LowRank]
    taken: Mapping[str, float]
    seconds: Mapping[str, Mapping[str, float]]
    whole: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


def correct_input_groups(
    input_groups: InputGroups,
    W: torch.Tensor,
    members: Sequence[Sequence[tuple[str, int]]],
    solved: Mapping[str, QuantizedLinear],
) -> CorrectedGroups | None:
    """Compute the corrections of all layers of input groups that get one.

    Args:
        input_groups: The input groups, factored; the regularizer is not needed.
        W: Original weights of all members of each, float32 [B, R, C], with the columns that corrections hold.
        members: Name and number of rows of each member of each.
        solved: Every member on its grid by name, on any device.

    Returns:
        The corrections; None where no layer gets one.

    Raises:
        NumericalError: A factor overflows the dtype in which it is stored, or the inputs that corrections read have a
            Hessian that cannot be factored within the damping limit.
    """
    wanted = input_groups.recipe.corrections
    layers = wanted.layers if wanted is not None else frozenset()
    if wanted is None or not any(name in layers for of_group in members for name, _ in of_group):
        return None
    corrections: dict[str, LowRank] = {}
    taken = dict.fromkeys(input_groups.names, 0.0)
    held = [held_columns([name for name, _ in of_group], input_groups.recipe) for of_group in members]
    whole = {group: (0.0, 0.0) for group, columns in zip(input_groups.names, held, strict=True) if columns}
    with timed(input_groups.seconds, "reconstruct", W.device):
        read = UnroundedInputs.of(input_groups)
    H, damping = (input_groups.H, _damping(input_groups)) if read is None else (read.H, read.damping)
    start = 0
    for alike in zip(*members, strict=True):  # the first members of all input groups, the second ones, ...
        names, num_rows = [name for name, _ in alike], alike[0][1]
        rows = slice(start, start + num_rows)
        start = rows.stop
        if names[0] not in layers:
            continue
        of_names = [solved[name] for name in names]
        E = _errors(input_groups, W[:, rows], of_names, read)
        with timed(input_groups.seconds, "reconstruct", W.device):
            factors = reconstruct(E, H, damping, wanted.settings.rank, wanted.settings.energy)
            stored = [correction.to(wanted.dtype) for correction in factors]
            measured = _measured(input_groups, W[:, rows], of_names, E, stored, with_energy=bool(whole))
        figures = zip(names, stored, input_groups.names, *measured, strict=True)
        for name, correction, group, error, left, energy in figures:
            if not left < float("inf"):
                raise NumericalError(
                    f"{name}: its correction of low rank is not finite in {wanted.dtype}; set reconstruction.rank: 0"
                )
            corrections[name] = correction
            taken[group] += error - left
            if group in whole:
                whole[group] = (whole[group][0] + error, whole[group][1] + energy)
    spent = {phase: seconds / len(input_groups.names) for phase, seconds in input_groups.spent_().items()}
    return CorrectedGroups(corrections, taken, dict.fromkeys(input_groups.names, spent), whole)


def with_corrections(
    layers: Mapping[str, QuantizedLinear], records: Sequence[LayerRecord], corrected: CorrectedGroups | None
) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
    """Put corrections beside the layers that they belong to, and into their records.

    Args:
        layers: Layers on their grids by name.
        records: Record of each input group.
        corrected: The corrections of these layers; None for none.

    Returns:
        The layers and the records.
    """
    if corrected is None:
        return dict(layers), list(records)
    corrections = {name: each for name, each in corrected.corrections.items() if each.rank}
    beside = {name: dataclasses.replace(layer, correction=corrections.get(name)) for name, layer in layers.items()}
    return beside, [_recorded(record, corrections, corrected) for record in records]


def _recorded(record: LayerRecord, corrections: Mapping[str, LowRank], corrected: CorrectedGroups) -> LayerRecord:
    of_record = {name: corrections[name] for name in record.members if name in corrections}
    seconds = dict(record.seconds)
    add_seconds(seconds, corrected.seconds.get(record.name, {}))
    if not of_record:
        return dataclasses.replace(record, seconds=seconds)
    of_solve = record.relative_error * record.output_energy, record.output_energy
    error, energy = corrected.whole.get(record.name, of_solve)
    divisor = max(energy, torch.finfo(torch.float32).tiny)
    return dataclasses.replace(
        record,
        relative_error=max(error - corrected.taken[record.name], 0.0) / divisor,
        solved_error=error / divisor,
        output_energy=energy,
        width_errors={bits: of_width * of_solve[1] / divisor for bits, of_width in record.width_errors.items()},
        ranks={name: correction.rank for name, correction in of_record.items()},
        correction_weights=sum(correction.num_weights for correction in of_record.values()),
        seconds=seconds,
    )


def _measured(
    input_groups: InputGroups,
    W: torch.Tensor,
    layers: Sequence[QuantizedLinear],
    E: torch.Tensor,
    corrections: Sequence[LowRank],
    with_energy: bool,
) -> tuple[list[float], list[float], list[float]]:
    """Return the squared output error of each layer without its correction, and with it; and the energy of its outputs.

    The energy is 0 where it is not asked for, as it may take a product that nothing else wants. Where inputs are
    rounded, what E tells is not the whole error, as the layer reads rounded inputs and the correction those that are
    not. It is then measured on the sampled tokens, as the error of the solve was.
    """
    rounding, H = input_groups.inputs.rounding, input_groups.H
    if rounding is None or any(input_groups.inputs.lacks_statistics):
        energy = W.new_zeros(len(W))
        for rows in _tiles(input_groups, W) if with_energy else ():
            energy += squared_error(behind_errors(input_groups, W[:, rows]), H).sum(-1)
        return squared_error(E, H).sum(-1).tolist(), remaining_errors(E, H, corrections), energy.tolist()
    before, after, energy = (W.new_zeros(len(W)) for _ in range(3))
    for rows in _tiles(input_groups, W):
        wanted = behind_errors(input_groups, W[:, rows])
        W_hat = torch.stack([_dequantized(layer, rows, W.device) for layer in layers])
        of_rows = [LowRank(each.A, each.B[rows]) for each in corrections]
        plain, corrected, of_outputs = sampled_errors(rounding, wanted, W_hat, of_rows)
        before += plain.sum(-1)
        after += corrected.sum(-1)
        energy += of_outputs.sum(-1)
    return before.tolist(), after.tolist(), energy.tolist()


def _errors(
    input_groups: InputGroups, W: torch.Tensor, layers: Sequence[QuantizedLinear], read: UnroundedInputs | None
) -> torch.Tensor:
    """Return what corrections of some layers have to make up for, float32 [B, R, C]; a tile of rows at a time.

    It is what the layers miss of the weights that were aimed at, but where corrections read other inputs than the
    layers.
    """
    E = torch.empty_like(W)
    for rows in _tiles(input_groups, W):
        if read is not None:
            W_hat = torch.stack([_dequantized(layer, rows, W.device) for layer in layers])
            E[:, rows] = read.missed(behind_errors(input_groups, W[:, rows]), W_hat)
            continue
        E[:, rows] = compensate(input_groups, W[:, rows])
        for of_layer, layer in zip(E, layers, strict=True):
            of_layer[rows].sub_(_dequantized(layer, rows, W.device))
    return E


def _tiles(input_groups: InputGroups, W: torch.Tensor) -> list[slice]:
    return row_tiles(W.shape[1], W.shape[2], input_groups.recipe.tile_elements_on(W.device), copies=len(W))


def _dequantized(layer: QuantizedLinear, rows: slice, device: torch.device) -> torch.Tensor:
    grid = dataclasses.replace(layer.grid, scale=layer.grid.scale[rows], zero=layer.grid.zero[rows])
    return QuantizedLinear(layer.Q[rows], grid).to(device).dequantize()


def _damping(input_groups: InputGroups) -> torch.Tensor:
    """Return what is added to the diagonal of each Hessian, float32 [B]."""
    mean = input_groups.H.diagonal(dim1=-2, dim2=-1).mean(-1)
    factor, settings = input_groups.factor, input_groups.recipe.solver
    return mean * (factor.damping.float() if factor is not None else settings.damping)
