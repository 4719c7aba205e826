"""GPTQ (arXiv 2210.17323): round column by column, let later columns absorb the error.

GPTQ as published eliminates columns from H⁻¹. The same result follows from one Cholesky factor of H without any
inverse: with H = V Vᵀ, V upper triangular, the squared error of a row is ‖(w − q)V‖², and its i-th term only holds
columns up to i. Choosing q_i to make that term small, given the columns before it, is

    q_i = Q( w_i + Σ_{j<i} (w_j − q_j) N_ji ),      N_ji = V_ji / V_ii,

which is the published update (the equality is tested). Rows never meet: any tiling of rows gives the same weights.
Shapes: R rows, C columns, B layers side by side; work arrays are transposed [B, C, R], so that a column of a layer is
contiguous.
"""

import torch

from astro import fusion
from astro.batch import add_product_
from astro.grid import Grid
from astro.hessian import Factor

__all__ = ["activation_order", "solve"]

_BLOCK = 128
"""Columns between two products with all columns before them. Part of the arithmetic."""
_PANEL = 16
"""Columns of the innermost loop, where each column is updated by those before it in the panel."""


def activation_order(H: torch.Tensor) -> torch.Tensor:
    """Columns by falling diagonal of H [B, C, C], ties in their own order, int64 [B, C]."""
    return torch.argsort(H.diagonal(dim1=-2, dim2=-1), dim=-1, descending=True, stable=True)


def solve(W: torch.Tensor, factor: Factor, grid: Grid) -> torch.Tensor:
    """Quantize the rows of a layer, or of several side by side, to a fixed grid.

    Args:
        W: weights to approximate, float32 [B, R, C], or [R, C].
        factor: of the layers' damped Hessians, with the order in which columns are visited.
        grid: scale and zero point of each group, in the original column order.

    Returns:
        Integers in the original column order, int8 [B, R, C].
    """
    N, order = factor.feedback, factor.order
    num_columns = W.shape[-1]
    group = torch.div(order, grid.group_size, rounding_mode="floor")
    Wt, scale, zero = _columns(W.mT, order), grid.scale.mT.contiguous(), grid.zero.mT.contiguous()
    E = torch.empty_like(Wt)  # w − q of the columns already rounded
    Q = torch.empty_like(Wt, dtype=torch.int8)
    for start in range(0, num_columns, _BLOCK):
        stop = min(start + _BLOCK, num_columns)
        block = slice(start, stop)
        T = Wt[..., block, :].clone()
        if start:
            add_product_(T, N[..., :start, block].mT, E[..., :start, :])
        S, Z = _columns(scale, group[..., block]), _columns(zero, group[..., block])
        work = (T, Wt[..., block, :], S, grid.q_min - Z, grid.q_max - Z)
        integers, errors = [], []
        for left in range(start, stop, _PANEL):
            right = min(left + _PANEL, stop)
            panel = (X[..., left - start : right - start, :] for X in work)
            V, error = _round_panel(N[..., left:right, left:right], *panel)
            if right < stop:
                add_product_(T[..., right - start :, :], N[..., left:right, right:stop].mT, error)
            integers.append(V)
            errors.append(error)
        torch.cat(errors, -2, out=E[..., block, :])
        Q[..., block, :] = torch.cat(integers, -2) + Z
    return _columns(Q, order.argsort(-1)).mT.contiguous()


def _round_panel(
    N: torch.Tensor,
    T: torch.Tensor,
    W: torch.Tensor,
    S: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns of a panel one after the other; uses T up.

    Args:
        N: feedback within the panel, [B, P, P].
        T: weights with the errors of all columns before the panel made up for, [B, P, R].
        W: weights to approximate, [B, P, R].
        S: scales, with low and high the bounds of q − z, [B, P, R].

    Returns:
        Integers counted from the zero point, and w − q, both [B, P, R].
    """
    if fusion.is_enabled():
        return _rounded_panel(N, T, W, S, low, high)
    V, E = torch.empty_like(T), torch.empty_like(T)
    # Views of all columns at once: where rows are few, the calls are what takes time.
    t, w, e, v, s, least, most = (X.unbind(-2) for X in (T, W, E, V, S, low, high))
    for i in range(len(t)):
        torch.div(t[i], s[i], out=v[i]).round_().clamp_(least[i], most[i])
        torch.addcmul(w[i], v[i], s[i], value=-1, out=e[i])
        T[..., i + 1 :, :].addcmul_(N[..., i, i + 1 :].unsqueeze(-1), e[i].unsqueeze(-2))
    return V, E


@fusion.fused
def _rounded_panel(
    N: torch.Tensor,
    T: torch.Tensor,
    W: torch.Tensor,
    S: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as one chain of values: a compiler makes one loop over rows of it."""
    integers: list[torch.Tensor] = []
    errors: list[torch.Tensor] = []
    t, w, s, least, most = (X.unbind(-2) for X in (T, W, S, low, high))
    for i in range(len(t)):
        target = t[i]
        for j, e in enumerate(errors):
            target = target + N[..., j, i].unsqueeze(-1) * e
        integers.append((target / s[i]).round().clamp(least[i], most[i]))
        errors.append(w[i] - integers[i] * s[i])
    return torch.stack(integers, -2), torch.stack(errors, -2)


def _columns(X: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Columns of X [B, C, R], chosen for each layer by [B, C']."""
    layers, columns, rows = X.shape[:-2].numel(), X.shape[-2], X.shape[-1]
    first = torch.arange(layers, device=X.device).mul_(columns).view(*X.shape[:-2], 1)
    return X.reshape(-1, rows).index_select(0, (first + index).flatten()).view(*index.shape, rows)
