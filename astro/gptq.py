"""GPTQ (arXiv 2210.17323): round column by column, let later columns absorb the error.

GPTQ as published eliminates columns from H⁻¹. The same result follows from one Cholesky factor of H without any
inverse: with H = V Vᵀ, V upper triangular, the squared error of a row is ‖(w − q)V‖², and its i-th term only holds
columns up to i. Choosing q_i to make that term small, given the columns before it, is

    q_i = Q( w_i + Σ_{j<i} (w_j − q_j) N_ji ),      N_ji = V_ji / V_ii,

which is the published update (the equality is tested). Rows never meet: any tiling of rows gives the same weights.
Shapes: R rows, C columns; work arrays are transposed [C, R], so that a column is contiguous.
"""

import torch

from astro.grid import Grid
from astro.hessian import Factor

__all__ = ["activation_order", "solve"]

_BLOCK = 128
"""Columns between two products with all columns before them. Part of the arithmetic."""
_PANEL = 16
"""Columns of the innermost loop, where each column is updated by those before it in the panel."""


def activation_order(H: torch.Tensor) -> torch.Tensor:
    """Columns by falling diagonal of H, ties in their own order, int64 [C]."""
    return torch.argsort(H.diagonal(), descending=True, stable=True)


def solve(W: torch.Tensor, factor: Factor, grid: Grid) -> torch.Tensor:
    """Quantize a layer's rows to a fixed grid.

    Args:
        W: weights to approximate, float32 [R, C].
        factor: of the layer's damped Hessian, with the order in which columns are visited.
        grid: scale and zero point of each group, in the original column order.

    Returns:
        Integers in the original column order, int8 [R, C].
    """
    N, order = factor.feedback, factor.order
    num_columns = W.shape[1]
    group = torch.div(order, grid.group_size, rounding_mode="floor")
    Wt = W.T[order]
    scale, zero = grid.scale.T.contiguous(), grid.zero.T.contiguous()
    E = torch.empty_like(Wt)  # w − q of the columns already rounded
    Q = torch.empty_like(Wt, dtype=torch.int8)
    for start in range(0, num_columns, _BLOCK):
        stop = min(start + _BLOCK, num_columns)
        block = slice(start, stop)
        T = Wt[block] + N[:start, block].T @ E[:start] if start else Wt[block].clone()
        S, Z = scale[group[block]], zero[group[block]]
        V = torch.empty_like(T)  # integers, counted from the zero point
        # Views of all columns at once: where rows are few, the calls are what takes time.
        t, w, e, v, s, low, high = (X.unbind() for X in (T, Wt[block], E[block], V, S, grid.q_min - Z, grid.q_max - Z))
        feedback = N[:stop, block].unbind(1)
        for left in range(start, stop, _PANEL):
            right = min(left + _PANEL, stop)
            if left > start:
                T[left - start : right - start] += N[start:left, left:right].T @ E[start:left]
            for i in range(left - start, right - start):
                past = slice(left, start + i)
                target = torch.addmv(t[i], E.T[:, past], feedback[i][past]) if start + i > left else t[i]
                torch.div(target, s[i], out=v[i]).round_().clamp_(low[i], high[i])
                torch.sub(w[i], v[i] * s[i], out=e[i])
        Q[block] = V + Z
    out = torch.empty_like(Q)
    out[order] = Q
    return out.T.contiguous()
