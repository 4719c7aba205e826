"""Refinement: coordinate descent on the layer error after GPTQ, against the original weights.

GPTQ fixes a column before it sees the ones after it. Here every integer, and every scale, is chosen once more with all
others in place. For a row with error e = w − ŵ, ŵ = (q − z) s, the damped layer error is e A eᵀ with A = H + λI, and
along one coordinate it is a parabola:

    integer i:  the minimum is at ŵ_i + (e A)_i / A_ii, of the grid's points the nearest one is best;
    scale k:    with the group's v = q − z, the minimum is at s_k + (e A)_k vᵀ / (v A_kk vᵀ).

A move is made only where it lowers that error, so no pass can raise it. The damping is GPTQ's own: without it a column
whose input was nearly silent on the calibration text would be free to go anywhere. Rows never meet.
Shapes: R rows, C columns, g columns a group; work arrays are transposed [C, R], so that a column is contiguous.
"""

import dataclasses

import torch

from astro.grid import Grid

__all__ = ["refine"]

_BLOCK = 128
"""Columns between two products with all columns; a smaller group is a block of its own. Part of the arithmetic."""
_PANEL = 16
"""Columns of the innermost loop."""
_CAUTION = 1 - 1e-4
"""Share of the way to a parabola's minimum that is gone, so that float32 never takes a loss for a gain: an integer
only moves past the middle of two grid points."""


def refine(
    W: torch.Tensor,
    Q: torch.Tensor,
    grid: Grid,
    H: torch.Tensor,
    damping: torch.Tensor,
    passes: int,
    tolerance: float,
    scale_dtype: torch.dtype,
) -> tuple[torch.Tensor, Grid]:
    """Lower the layer error of quantized rows by passes over their scales and integers.

    Args:
        W: original weights, float32 [R, C].
        Q: integers, int8 [R, C].
        grid: scale and zero point of each group; zero points stay.
        H: undamped Hessian, float32 [C, C].
        damping: λ, a scalar tensor.
        passes: at most so many.
        tolerance: a pass that lowers the error of these rows by a smaller share is the last.
        scale_dtype: dtype in which scales are stored; every new scale is exact in it.

    Returns:
        Integers int8 [R, C] and their grid. In the damped layer error never worse than what was given.
    """
    state = _State(
        V=(Q.float().reshape(len(Q), -1, grid.group_size) - grid.zero.unsqueeze(-1)).flatten(1).T.contiguous(),
        E=(W - grid.dequantize(Q)).T.contiguous(),
        scale=grid.scale.T.clone(),
        zero=grid.zero.T.contiguous(),
        H=H,
        damping=damping,
        grid=grid,
        scale_dtype=scale_dtype,
    )
    error = torch.linalg.vecdot(state.E, state.product(slice(None)), dim=0).sum() if passes else H.new_zeros(())
    for _ in range(passes):
        gain = state.sweep()
        if not bool(gain >= tolerance * error):
            break
        error = error - gain
    Q = (state.V.T.reshape(len(W), -1, grid.group_size) + grid.zero.unsqueeze(-1)).flatten(1).to(torch.int8)
    return Q, dataclasses.replace(grid, scale=state.scale.T.contiguous())


@dataclasses.dataclass
class _State:
    """Rows under refinement: V = q − z and E = w − ŵ [C, R], scale and zero [G, R]."""

    V: torch.Tensor
    E: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    H: torch.Tensor
    damping: torch.Tensor
    grid: Grid
    scale_dtype: torch.dtype

    def product(self, rows: slice) -> torch.Tensor:
        """Rows of (H + λI) E."""
        return (self.H[rows] @ self.E).addcmul_(self.damping, self.E[rows])

    def sweep(self) -> torch.Tensor:
        """One pass over all scales and integers; by how much the error fell, a scalar tensor."""
        gain = self.H.new_zeros(())
        size = self.grid.group_size
        for k in range(len(self.scale)):
            group = slice(k * size, (k + 1) * size)
            G = self.product(group)
            gain = gain + self._move_scale(k, group, G)
            for start in range(group.start, group.stop, _BLOCK):
                block = slice(start, min(start + _BLOCK, group.stop))
                if start > group.start:
                    G = self.product(block)
                gain = gain + self._move_integers(k, block, G)
        return gain

    def _move_scale(self, k: int, group: slice, G: torch.Tensor) -> torch.Tensor:
        """Refit a group's scale; brings the group's rows of G = H E up to date."""
        V, s = self.V[group], self.scale[k]
        HV = (self.H[group, group] @ V).addcmul_(self.damping, V)
        slope, curvature = torch.linalg.vecdot(G, V, dim=0), torch.linalg.vecdot(HV, V, dim=0)
        best = s + slope / curvature.clamp(min=torch.finfo(torch.float32).tiny)
        stored = best.to(self.scale_dtype).float()
        step = stored - s
        gain = step * (2 * _CAUTION * slope - step * curvature)
        wanted = (gain > 0) & (stored * s > 0)
        step = torch.where(wanted, step, 0.0)
        self.scale[k] += step
        self.E[group] -= V * step
        G -= HV * step
        return torch.where(wanted, gain, 0.0).sum()

    def _move_integers(self, k: int, block: slice, G: torch.Tensor) -> torch.Tensor:
        """Choose the integers of some columns of a group anew, one column after the other; alters G."""
        H, V, E, s = self.H[block, block], self.V[block], self.E[block], self.scale[k]
        low, high = self.grid.q_min - self.zero[k], self.grid.q_max - self.zero[k]
        diagonal = (H.diagonal() + self.damping).unsqueeze(1)
        pace = _CAUTION / diagonal
        D, chosen = torch.empty_like(V), torch.empty_like(V)  # change of ŵ; integers
        # Views of all columns at once: where rows are few, the calls are what takes time.
        D_T, g, d, h, v, q = D.T, G.unbind(), D.unbind(), H.unbind(1), V.unbind(), chosen.unbind()
        for left in range(0, len(V), _PANEL):
            panel = slice(left, min(left + _PANEL, len(V)))
            if left:
                G[panel] -= H[panel, :left] @ D[:left]
            per_slope = (pace[panel] / s).unbind()
            for i in range(panel.start, panel.stop):
                if i > left:
                    g[i].addmv_(D_T[:, left:i], h[i][left:i], alpha=-1)
                torch.addcmul(v[i], g[i], per_slope[i - left], out=q[i]).round_().clamp_(low, high)
                torch.sub(q[i], v[i], out=d[i]).mul_(s)
        V.copy_(chosen)
        E -= D
        G = G[: len(V)]
        gain: torch.Tensor = torch.linalg.vecdot(D, 2 * G - D * diagonal, dim=0)
        return gain.sum()
