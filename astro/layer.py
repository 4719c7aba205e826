"""One group of linear layers with a common input: stack, solve tile by tile, cut apart, record.

Members (q, k, v; gate, up) are stacked along their rows: one Hessian, one factorization, one solve for all.
Shapes: R rows of all members together, C columns.
"""

import dataclasses
from collections.abc import Sequence

import torch

from astro import beta
from astro.config import Quantization, Regularizer
from astro.errors import NumericalError
from astro.grid import Grid
from astro.group import GroupOutcome, SolvedRows, measure_width, prepare_group, solve_rows
from astro.report import LayerRecord
from astro.tiling import row_tiles

__all__ = ["QuantizedLinear", "merge_rows", "quantize_group", "stack"]


@dataclasses.dataclass(frozen=True)
class QuantizedLinear:
    """One linear layer on its grid.

    Attributes:
        Q: integers, int8 [R, C].
        grid: scale and zero point of each group.
    """

    Q: torch.Tensor
    grid: Grid

    def dequantize(self) -> torch.Tensor:
        """The weights, float32 [R, C]."""
        return self.grid.dequantize(self.Q)


def stack(weights: Sequence[tuple[str, torch.Tensor]]) -> tuple[str, torch.Tensor]:
    """Name of a group and the weights of its members over each other, float32 [R, C]."""
    return "+".join(name for name, _ in weights), torch.cat([weight.float() for _, weight in weights])


def quantize_group(
    weights: Sequence[tuple[str, torch.Tensor]],
    H: torch.Tensor,
    num_tokens: int,
    quantization: Quantization,
    regularization: Regularizer,
    scale_dtype: torch.dtype,
    widths: Sequence[int] = (),
) -> tuple[dict[str, QuantizedLinear], LayerRecord]:
    """Quantize linear layers that read the same input.

    Args:
        weights: name and weight [R_m, C] of each member, any float dtype, on the device of H.
        H: mean of xxᵀ over the calibration tokens, float32 [C, C].
        num_tokens: tokens in H.
        quantization: grid and solver, the width settled.
        regularization: what is done to the weights before.
        scale_dtype: dtype in which scales are stored.
        widths: that are measured besides, on sampled rows.

    Returns:
        Each member on its grid by name, and the record of the group.

    Raises:
        NumericalError: H cannot be factored within the damping limit, or a result is not finite.
    """
    name, W = stack(weights)
    group = prepare_group(name, W, H, quantization, regularization, scale_dtype)
    if group.beta is None:
        group = beta.search(group, W)
    solved = [solve_rows(group, W[rows]) for rows in row_tiles(len(W), W.shape[1], W.device.type)]
    errors = {bits: measure_width(group, W, bits) for bits in widths}
    rows = [(member, len(weight)) for member, weight in weights]
    members, record = merge_rows(rows, quantization, solved, group.outcome_(), num_tokens)
    return members, dataclasses.replace(record, width_errors=errors)


def merge_rows(
    members: Sequence[tuple[str, int]],
    quantization: Quantization,
    solved: Sequence[SolvedRows],
    outcome: GroupOutcome,
    num_tokens: int,
) -> tuple[dict[str, QuantizedLinear], LayerRecord]:
    """Members and record of a group from its solved tiles.

    Args:
        members: name and number of rows of each.
        quantization: grid and solver.
        solved: every tile of the group, in order.
        outcome: what was decided for the group.
        num_tokens: tokens in the group's Hessian.

    Raises:
        NumericalError: the layer error is not finite.
    """
    grids = [rows.grid for rows in solved]
    scale, zero = torch.cat([grid.scale for grid in grids]), torch.cat([grid.zero for grid in grids])
    grid = dataclasses.replace(grids[0], scale=scale, zero=zero)
    Q = torch.cat([rows.Q for rows in solved])
    error, energy, before, after = (
        float(torch.cat([getattr(rows.figures, figure) for rows in solved]).sum())
        for figure in ("error", "energy", "maximum_before", "maximum_after")
    )
    name = "+".join(member for member, _ in members)
    if not error < float("inf"):
        raise NumericalError(f"{name}: the layer error is {error}; a weight or an input is not finite")
    record = LayerRecord(
        name=name,
        bits=quantization.width,
        rows=len(Q),
        columns=Q.shape[1],
        group_size=grid.group_size,
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
    return _unstack(members, Q, grid), record


def _unstack(members: Sequence[tuple[str, int]], Q: torch.Tensor, grid: Grid) -> dict[str, QuantizedLinear]:
    apart, start = {}, 0
    for name, count in members:
        rows = slice(start, start + count)
        part = dataclasses.replace(grid, scale=grid.scale[rows], zero=grid.zero[rows])
        apart[name] = QuantizedLinear(Q[rows], part)
        start += count
    return apart
