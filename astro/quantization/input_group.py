"""Groups of linear layers with a common input: stack, solve tile by tile, cut apart, record.

Members (q, k, v; gate, up) are stacked along their rows: one Hessian, one factorization, one solve for all. Groups of
one shape, as those of a layer's experts, lie side by side.
Shapes: B groups, R rows of all members of one together, C columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from astro.config import Quantization, Regularizer
from astro.errors import NumericalError
from astro.linalg.batching import stacked
from astro.linalg.tiling import row_tiles
from astro.quantization import beta_search
from astro.quantization.grid import Grid, QuantizedLinear
from astro.quantization.layer_record import LayerRecord
from astro.quantization.row_solver import GroupOutcome, SolvedRows, measure_width, prepare_groups, solve_rows

__all__ = ["merge_rows", "quantize_groups", "stack"]

_FIGURES = ("error", "energy", "maximum_before", "maximum_after")


def stack(groups: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """The weights of each group's members over each other, groups of one shape side by side, float32 [B, R, C]."""
    return stacked([torch.cat([weight.float() for weight in members]) for members in groups])


def quantize_groups(
    groups: Sequence[Mapping[str, torch.Tensor]],
    H: torch.Tensor,
    num_tokens: Sequence[int],
    quantization: Quantization,
    regularization: Regularizer,
    scale_dtype: torch.dtype,
    widths: Sequence[int] = (),
    rounded: Sequence[bool] = (),
) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
    """Quantize groups of linear layers, those of a group with a common input, all groups of one shape.

    Args:
        groups: weight [R_m, C] of each member of each group by name, any float dtype, on the device of H.
        H: mean of xxᵀ over the calibration tokens of each group, float32 [B, C, C].
        num_tokens: tokens in each H.
        quantization: grid and solver, the width settled.
        regularization: what is done to the weights before.
        scale_dtype: dtype in which scales are stored.
        widths: that are measured besides, on sampled rows.
        rounded: groups without statistics, whose H is the identity: nothing is regularized. None where not given.

    Returns:
        Each member on its grid by name, and the record of each group.

    Raises:
        NumericalError: H cannot be factored within the damping limit, or a result is not finite.
    """
    W = stack([list(members.values()) for members in groups])
    names = ["+".join(members) for members in groups]
    prepared = prepare_groups(names, W, H, quantization, regularization, scale_dtype, rounded=rounded)
    if prepared.beta is None:
        prepared = beta_search.search(prepared, W)
    tiles = row_tiles(W.shape[1], W.shape[2], W.device.type, copies=len(W))
    solved = [solve_rows(prepared, W[:, rows]) for rows in tiles]
    errors = {bits: measure_width(prepared, W, bits) for bits in widths}
    rows = [[(name, len(weight)) for name, weight in members.items()] for members in groups]
    members, records = merge_rows(rows, quantization, solved, prepared.outcomes_(), num_tokens)
    measured = [{bits: errors[bits][i] for bits in widths} for i in range(len(groups))]
    return members, [replace(record, width_errors=own) for record, own in zip(records, measured, strict=True)]


def merge_rows(
    groups: Sequence[Sequence[tuple[str, int]]],
    quantization: Quantization,
    solved: Sequence[SolvedRows],
    outcomes: Sequence[GroupOutcome],
    num_tokens: Sequence[int],
) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
    """Members and records of groups from their solved tiles.

    Args:
        groups: name and number of rows of each member of each.
        quantization: grid and solver.
        solved: every tile of the groups, in order.
        outcomes: what was decided for each group.
        num_tokens: tokens in the Hessian of each.

    Raises:
        NumericalError: the layer error is not finite.
    """
    grids = [rows.grid for rows in solved]
    scale, zero = torch.cat([grid.scale for grid in grids], dim=1), torch.cat([grid.zero for grid in grids], dim=1)
    Q = torch.cat([rows.Q for rows in solved], dim=1)
    totals = sum(torch.stack([getattr(rows.figures, own).sum(-1) for own in _FIGURES]) for rows in solved)
    assert isinstance(totals, torch.Tensor)
    quantized: dict[str, QuantizedLinear] = {}
    records = []
    for i, (members, figures) in enumerate(zip(groups, totals.T.tolist(), strict=True)):
        grid = replace(grids[0], scale=scale[i], zero=zero[i])
        quantized |= _unstack(members, Q[i], grid)
        name = "+".join(member for member, _ in members)
        records.append(_record(name, quantization, QuantizedLinear(Q[i], grid), figures, outcomes[i], num_tokens[i]))
    return quantized, records


def _record(
    name: str,
    quantization: Quantization,
    solved: QuantizedLinear,
    figures: Sequence[float],
    outcome: GroupOutcome,
    num_tokens: int,
) -> LayerRecord:
    error, energy, before, after = figures
    if not error < float("inf"):
        raise NumericalError(f"{name}: the layer error is {error}; a weight or an input is not finite")
    return LayerRecord(
        name=name,
        bits=quantization.width,
        rows=solved.Q.shape[0],
        columns=solved.Q.shape[1],
        group_size=solved.grid.group_size,
        num_tokens=num_tokens,
        routed_tokens=num_tokens,
        fallback="",
        relative_error=error / max(energy, torch.finfo(torch.float32).tiny),
        beta=outcome.beta,
        beta_gain=outcome.beta_gain,
        width_errors={},
        group_maximum_ratio=after / before if before > 0 else 1.0,
        damping=outcome.damping,
        factorizations=outcome.factorizations,
        seconds=outcome.seconds,
    )


def _unstack(members: Sequence[tuple[str, int]], Q: torch.Tensor, grid: Grid) -> dict[str, QuantizedLinear]:
    apart, start = {}, 0
    for name, count in members:
        rows = slice(start, start + count)
        part = replace(grid, scale=grid.scale[rows], zero=grid.zero[rows])
        apart[name] = QuantizedLinear(Q[rows], part)
        start += count
    return apart
