"""GPTQ (arXiv 2210.17323): columns are rounded one by one, and later columns absorb the errors of earlier ones.

GPTQ as published eliminates columns from H⁻¹. The same result follows from one Cholesky factor of H without any
inverse: with H = V Vᵀ, V upper triangular, the squared error of a row is ‖(w − q)V‖², and its i-th term only holds
columns up to i. Making that term small, given the columns before it, is the published update (a test compares them).
With s the scale and z the zero point of a column's group, and N_ji = V_ji / V_ii, column i is rounded like this:

    t_i = w_i + Σ_{j<i} e_j N_ji                                (1)
    v_i = clamp(round(t_i / s), q_min − z, q_max − z)           (2)
    e_i = w_i − v_i s                                           (3)

The integer is q_i = v_i + z. Rows never meet: any tiling of rows gives the same weights.
Shapes: R rows, C columns, B layers side by side; work arrays are transposed [B, C, R], so that a column of a layer is
contiguous.
"""

import dataclasses
from typing import NamedTuple

import torch

from astro.linalg import compiled
from astro.linalg.batching import add_product_
from astro.linalg.cholesky import Factor
from astro.linalg.panels import Panels, settle_apart
from astro.linalg.tiling import every
from astro.quantization import column_ops
from astro.quantization.grid import Grid

__all__ = ["activation_order", "solve"]

_BLOCK = 128
"""Columns between two products with all columns before them. It is part of the arithmetic: another number rounds
differently."""


def activation_order(H: torch.Tensor) -> torch.Tensor:
    """Return the columns by falling diagonal of H [B, C, C], equal ones in their original order, int64 [B, C]."""
    return torch.argsort(H.diagonal(dim1=-2, dim2=-1), dim=-1, descending=True, stable=True)


def solve(W: torch.Tensor, factor: Factor, grid: Grid) -> torch.Tensor:
    """Quantize the rows of a layer, or of several side by side, to a fixed grid.

    Args:
        W: Weights to approximate, float32 [B, R, C], or [R, C].
        factor: Factor of the layers' damped Hessians, with the order in which columns are visited.
        grid: Scale and zero point of each group, in the original column order.

    Returns:
        The integers in the original column order, int8 [B, R, C].
    """
    order = factor.order
    group = torch.div(order, grid.group_size, rounding_mode="floor")
    Wt = _columns(W.mT, order)
    transposed = dataclasses.replace(grid, scale=grid.scale.mT.contiguous(), zero=grid.zero.mT.contiguous())
    settle = _settle_by_kernels if compiled.run_by_kernels() else _settle
    return _columns(settle(Wt, factor.feedback, group, transposed), order.argsort(-1)).mT.contiguous()


def _settle(Wt: torch.Tensor, N: torch.Tensor, group: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the integers [B, C, R] of weights in the order of their columns, with the group of each, [B, C]."""
    num_columns = Wt.shape[-2]
    E = torch.empty_like(Wt)  # w − q of the columns already rounded
    Q = torch.empty_like(Wt, dtype=torch.int8)
    work = _block(Wt[..., :_BLOCK, :])
    for block in every(num_columns, _BLOCK):
        if block.stop - block.start != work.size:
            work = _block(Wt[..., block, :])
        columns = work.arrays
        columns.T.copy_(columns.W.copy_(Wt[..., block, :]))
        if block.start:  # eq. 1, from earlier blocks
            add_product_(columns.T, N[..., : block.start, block].mT, E[..., : block.start, :])
        work.M.copy_(N[..., block, block])
        columns.S.copy_(_columns(grid.scale, group[..., block]))
        Z = _columns(grid.zero, group[..., block])
        torch.sub(grid.q_min, Z, out=columns.low)
        torch.sub(grid.q_max, Z, out=columns.high)
        work.settle_()
        E[..., block, :] = columns.E
        Q[..., block, :] = columns.V.add_(Z)
    return Q


def _settle_by_kernels(Wt: torch.Tensor, N: torch.Tensor, group: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Do the same with one kernel for each block, and one for the product with all columns before it."""
    E, Q = torch.empty_like(Wt), torch.empty_like(Wt, dtype=torch.int8)
    for block in every(Wt.shape[-2], _BLOCK):
        T = W = Wt[..., block, :]
        if block.start:  # eq. 1, from earlier blocks
            T = torch.baddbmm(W, N[..., : block.start, block].mT, E[..., : block.start, :])
        column_ops.round_columns(
            N[..., block, block], T, W, grid.scale, grid.zero, group[..., block], E[..., block, :], Q[..., block, :],
            grid.q_min, grid.q_max,
        )  # fmt: skip
    return Q


class _Columns(NamedTuple):
    """What belongs to some columns, [B, P, R], or to a single one, [B, 1, R].

    Attributes:
        T: What the columns want: weights with the errors of all columns before made up for. It is used up.
        W: Weights to approximate.
        S: Scales.
        low: Least integers, counted from the zero point.
        high: Greatest integers, counted from the zero point.
        V: The integers, counted from the zero point.
        E: The errors w − v s.
    """

    T: torch.Tensor
    W: torch.Tensor
    S: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    V: torch.Tensor
    E: torch.Tensor


def _round_(column: _Columns) -> torch.Tensor:
    """Round one column; `Panels` hands its error to the later ones, which is eq. 1 within a block."""
    t, w, s, low, high, v, e = column
    torch.div(t, s, out=v).round_().clamp_(low, high)  # eq. 2
    return torch.addcmul(w, v, s, value=-1, out=e)  # eq. 3


@compiled.fused
def _rounded_panel(N: torch.Tensor, *arrays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors and integers of a panel, for a compiler."""
    columns = settle_apart(_Columns(*arrays), N, _round_)
    return torch.cat([column.E for column in columns], -2), torch.cat([column.V for column in columns], -2)


def _block(like: torch.Tensor) -> Panels[_Columns]:
    """A block of columns for weights of some shape."""
    arrays = _Columns(*(like.new_empty(like.shape) for _ in _Columns._fields))
    return Panels(arrays, (arrays.E, arrays.V), _round_, _rounded_panel)


def _columns(X: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return columns of X [B, C, R], chosen for each layer by an index [B, C']."""
    layers, columns, rows = X.shape[:-2].numel(), X.shape[-2], X.shape[-1]
    first = torch.arange(layers, device=X.device).mul_(columns).view(*X.shape[:-2], 1)
    return X.reshape(-1, rows).index_select(0, (first + index).flatten()).view(*index.shape, rows)
