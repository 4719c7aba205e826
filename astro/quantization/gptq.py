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

from astro.linalg import compiled
from astro.linalg.batching import add_product_
from astro.linalg.cholesky import Factor
from astro.linalg.tiling import every
from astro.quantization.grid import Grid

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
    work = _Columns(Wt[..., :_BLOCK, :])
    for start in range(0, num_columns, _BLOCK):
        stop = min(start + _BLOCK, num_columns)
        block = slice(start, stop)
        if stop - start != work.size:
            work = _Columns(Wt[..., block, :])
        work.T.copy_(work.W.copy_(Wt[..., block, :]))
        if start:
            add_product_(work.T, N[..., :start, block].mT, E[..., :start, :])
        work.N.copy_(N[..., block, block])
        work.S.copy_(_columns(scale, group[..., block]))
        Z = _columns(zero, group[..., block])
        torch.sub(grid.q_min, Z, out=work.low)
        torch.sub(grid.q_max, Z, out=work.high)
        work.round_(E[..., block, :])
        Q[..., block, :] = work.V.add_(Z)
    return _columns(Q, order.argsort(-1)).mT.contiguous()


class _Columns:
    """A block of columns, which are rounded one after the other.

    Kept from block to block, with views of every column: where rows are few, the calls are what takes time.

    Attributes:
        N: feedback within the block, [B, P, P].
        T: weights with the errors of all columns before made up for, [B, P, R]; used up.
        W: weights to approximate, [B, P, R].
        S: scales, with low and high the bounds of q − z, [B, P, R].
        low: see S.
        high: see S.
        V: the integers, counted from the zero point, [B, P, R].
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.size = like.shape[-2]
        self.N = like.new_empty(*like.shape[:-2], self.size, self.size)
        self.T, self.W, self.S, self.low, self.high, self.V, self._E = (like.new_empty(like.shape) for _ in range(7))
        self._panels = every(self.size, _PANEL)
        columns = zip(
            *(X.unbind(-2) for X in (self.T, self.W, self.S, self.low, self.high, self.V, self._E)), strict=True
        )
        self._views = []
        for i, own in enumerate(columns):
            later = slice(i + 1, min((i // _PANEL + 1) * _PANEL, self.size))
            rest, factors = self.T[..., later, :], self.N[..., i, later].unsqueeze(-1)
            self._views.append((*own, rest, factors, own[-1].unsqueeze(-2)))

    def round_(self, E: torch.Tensor) -> None:
        """Fill V, and E with w − q, [B, P, R]."""
        integers, errors = [], []
        for panel in self._panels:
            if compiled.is_enabled():
                work = (X[..., panel, :] for X in (self.T, self.W, self.S, self.low, self.high))
                V, error = _rounded_panel(self.N[..., panel, panel], *work)
                integers.append(V)
                errors.append(error)
            else:
                error = self._E[..., panel, :]
                for t, w, s, low, high, v, e, rest, factors, row in self._views[panel]:
                    torch.div(t, s, out=v).round_().clamp_(low, high)
                    torch.addcmul(w, v, s, value=-1, out=e)
                    rest.addcmul_(factors, row)
            if panel.stop < self.size:
                add_product_(self.T[..., panel.stop :, :], self.N[..., panel, panel.stop :].mT, error)
        if integers:
            torch.cat(integers, -2, out=self.V)
            torch.cat(errors, -2, out=E)
        else:
            E.copy_(self._E)


@compiled.fused
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
