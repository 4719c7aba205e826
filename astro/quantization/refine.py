"""Refinement: coordinate descent on the layer error after GPTQ, against the original weights.

GPTQ fixes a column before it sees the ones after it. Here every integer, and every scale, is chosen once more with all
others in place. For a row with error e = w − ŵ, ŵ = (q − z) s, the damped layer error is e A eᵀ with A = H + λI, and
along one coordinate it is a parabola:

    integer i:  the minimum is at ŵ_i + (e A)_i / A_ii, of the grid's points the nearest one is best;
    scale k:    with the group's v = q − z, the minimum is at s_k + (e A)_k vᵀ / (v A_kk vᵀ).

A move is made only where it lowers that error by the slopes e A at hand. They come from products of factors that may be
rounded to bfloat16 (`astro.half`): a slope that is a little off only matters near the middle of two grid points, where
both are as good. Rows that are not better in the end, measured in float32, stay what they were. The damping is GPTQ's
own: without it a column whose input was nearly silent on the calibration text would be free to go anywhere. Rows never
meet.
Shapes: R rows, C columns, g columns a group, B layers side by side; work arrays are transposed [B, C, R], so that a
column of a layer is contiguous.
"""

import dataclasses

import torch

from astro.linalg import compiled
from astro.linalg.batching import add_product_
from astro.linalg.bf16_matmul import product, rounded
from astro.linalg.symmetric import squared_error
from astro.linalg.tiling import every
from astro.quantization.grid import Grid, grouped

__all__ = ["refine"]

_SPAN = 256
"""Columns between two products with all columns, at most, or a whole group. Part of the arithmetic."""
_BLOCK = 128
"""Columns, of one group, between two products with the rest of a span. At least half of it: where a span holds several
groups each of them is one block then."""
_PANEL = 16
"""Columns of the innermost loop."""
_CAUTION = 1 - 1e-4
"""Share of the way to a parabola's minimum that is gone, so that rounding in float32 never takes a loss for a
gain: an integer only moves past the middle of two grid points."""


def refine(
    W: torch.Tensor,
    Q: torch.Tensor,
    grid: Grid,
    H: torch.Tensor,
    damping: torch.Tensor,
    passes: int,
    tolerance: float,
    scale_dtype: torch.dtype,
) -> tuple[torch.Tensor, Grid, torch.Tensor]:
    """Lower the layer error of quantized rows by passes over their scales and integers.

    Args:
        W: original weights, float32 [B, R, C], or [R, C].
        Q: integers, int8 [B, R, C].
        grid: scale and zero point of each group; zero points stay.
        H: undamped Hessians, float32 [B, C, C].
        damping: λ of each, float32 [B].
        passes: at most so many.
        tolerance: a pass that lowers the error of no layer's rows by a larger share is the last.
        scale_dtype: dtype in which scales are stored; every new scale is exact in it.

    Returns:
        Integers int8 [B, R, C], their grid, and the layer error of each row, float32 [B, R]. No row is worse than what
        was given in the damped layer error, as float32 has it.
    """
    zero = grid.zero.mT.contiguous()
    state = _State(
        V=(grouped(Q.float(), grid.group_size) - grid.zero.unsqueeze(-1)).flatten(-2).mT.contiguous(),
        E=(W - grid.dequantize(Q)).mT.contiguous(),
        scale=grid.scale.mT.clone(memory_format=torch.contiguous_format),
        low=grid.q_min - zero,
        high=grid.q_max - zero,
        H=H,
        damping=damping.unsqueeze(-1).unsqueeze(-1),
        group_size=grid.group_size,
        scale_dtype=scale_dtype,
    )
    before, damped_before = state.errors()
    for _ in range(passes):
        gain, error = state.sweep()
        if not bool((gain >= tolerance * error).any()):
            break
    after, damped_after = state.errors()
    is_better = damped_after < damped_before
    rows = is_better.unsqueeze(-1)
    moved = (grouped(state.V.mT, grid.group_size) + grid.zero.unsqueeze(-1)).flatten(-2).to(torch.int8)
    scale = torch.where(rows, state.scale.mT, grid.scale).contiguous()
    error = torch.where(is_better, after, before)
    return torch.where(rows, moved, Q), dataclasses.replace(grid, scale=scale), error


@dataclasses.dataclass
class _State:
    """Rows under refinement.

    Attributes:
        V: q − z, [B, C, R].
        E: w − ŵ, [B, C, R].
        scale: of each group; with low and high the bounds of V, [B, G, R]. All of them are contiguous: a row is read
            and written group by group, on a GPU by kernels that want their rows aligned.
        H: undamped, [B, C, C].
        damping: λ, [B, 1, 1].
        diagonal: of H + λI, [B, C, 1].
        half_H: H `rounded`.
        half_E: E `rounded`, kept up to date; where nothing is, E itself.
    """

    V: torch.Tensor
    E: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    H: torch.Tensor
    damping: torch.Tensor
    group_size: int
    scale_dtype: torch.dtype
    diagonal: torch.Tensor = dataclasses.field(init=False)
    half_H: torch.Tensor = dataclasses.field(init=False)
    half_E: torch.Tensor = dataclasses.field(init=False)
    _work: dict[int, "_Columns"] = dataclasses.field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.half_H, self.half_E = rounded(self.H), rounded(self.E)
        self.diagonal = self.H.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) + self.damping

    def slopes(self, rows: slice) -> torch.Tensor:
        """Rows of (H + λI) E."""
        return product(self.half_H[..., rows, :], self.half_E).addcmul_(self.damping, self.E[..., rows, :])

    def errors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer error of each row, and the damped one, [B, R]."""
        error = squared_error(self.E.mT, self.H)
        return error, error + self.damping.squeeze(-1) * torch.linalg.vecdot(self.E, self.E, dim=-2)

    def lower_(self, rows: slice, change: torch.Tensor) -> None:
        """Take what was added to ŵ off E."""
        E = self.E[..., rows, :].sub_(change)
        if self.half_E is not self.E:
            self.half_E[..., rows, :].copy_(E)

    def sweep(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass over all scales and integers.

        Returns:
            By how much the error of each layer fell, and about what it was: each group's share as the pass met it,
            which costs no product of its own. Both [B].
        """
        gain = torch.zeros_like(self.scale[..., 0, :])
        error = torch.zeros_like(gain)
        num_groups, size = self.scale.shape[-2], self.group_size
        step = max(1, _SPAN // size)
        for first in range(0, num_groups, step):
            last = min(first + step, num_groups)
            stop = last * size
            G = self.slopes(slice(first * size, stop))  # of the columns that are yet to come
            for k in range(first, last):
                group = slice(k * size, (k + 1) * size)
                error += torch.linalg.vecdot(self.E[..., group, :], G[..., :size, :], dim=-2)
                D, own = self._move_scale(k, group, G[..., :size, :])
                gain += own
                for start in range(group.start, group.stop, _BLOCK):
                    block = slice(start, min(start + _BLOCK, group.stop))
                    moved, gain = self._move_integers(k, block, G[..., : block.stop - start, :], gain)
                    G = G[..., block.stop - start :, :]
                    if block.stop < stop:
                        # Beyond the group, of which this is all then, the change of its scale counts as well.
                        moved = moved if block.stop < group.stop else moved.add_(D)
                        add_product_(G, self.H[..., block.stop : stop, block], moved, alpha=-1)
        return gain.sum(-1), error.sum(-1)

    def _move_scale(self, k: int, group: slice, G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Refit a group's scale; brings the group's rows of G = (H + λI) E up to date. Change of ŵ, and the gain."""
        V, s = self.V[..., group, :], self.scale[..., k, :]
        HV = (self.H[..., group, group] @ V).addcmul_(self.damping, V)
        slope, curvature = torch.linalg.vecdot(G, V, dim=-2), torch.linalg.vecdot(HV, V, dim=-2)
        best = torch.addcdiv(s, slope, curvature.clamp(min=torch.finfo(torch.float32).tiny))
        step, gain = _scale_step(s, best.to(self.scale_dtype).float(), slope, curvature)
        s += step
        D = V * step.unsqueeze(-2)
        self.lower_(group, D)
        G.addcmul_(HV, step.unsqueeze(-2), value=-1)
        return D, gain

    def _move_integers(
        self, k: int, block: slice, G: torch.Tensor, gain: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the integers of some columns of a group anew, one column after the other.

        In units of the scale: column i wants to move by t_i = (e A)_i / (A_ii s), and where it does by d_i a later
        column j wants to by d_i A_ij / A_jj less.

        Returns:
            The change of ŵ, and the gain with that of these columns.
        """
        V, s = self.V[..., block, :], self.scale[..., k, :].unsqueeze(-2)
        size = V.shape[-2]
        work = self._work.get(size) or self._work.setdefault(size, _Columns(V))
        caution = _CAUTION / self.diagonal[..., block, :]
        torch.div(G, s, out=work.T).mul_(caution)
        torch.mul(self.H[..., block, block], caution.mT, out=work.M)
        torch.sub(self.low[..., k, :].unsqueeze(-2), V, out=work.low)
        torch.sub(self.high[..., k, :].unsqueeze(-2), V, out=work.high)
        D = work.choose_()
        V += D
        # What each move gained, T being what it was when its column came to its turn; infinite for the least of scales.
        own = torch.linalg.vecdot(D, torch.sub(work.T.mul_(2), D, alpha=_CAUTION).div_(caution), dim=-2)
        moved = D * s
        self.lower_(block, moved)
        return moved, torch.addcmul(gain, own.nan_to_num_(), s.squeeze(-2).square())


class _Columns:
    """Some columns of a group, whose integers are chosen one after the other.

    Kept from block to block, with views of every column: where rows are few, the calls are what takes time.

    Attributes:
        T: by how much each wants to move, [B, P, R]; afterwards, by how much it did when it came to its turn.
        M: what a move of the first column takes off what the second wants, [B, P, P].
        low: with high the bounds of the moves, [B, P, R].
        high: see low.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.T, self._D, self.low, self.high = (like.new_empty(like.shape) for _ in range(4))
        size = like.shape[-2]
        self.M = like.new_empty(*like.shape[:-2], size, size)
        self._panels = every(size, _PANEL)
        t, d, low, high = (X.unbind(-2) for X in (self.T, self._D, self.low, self.high))
        self._views = []
        for i in range(size):
            later = slice(i + 1, min((i // _PANEL + 1) * _PANEL, size))
            rest, factors = self.T[..., later, :], self.M[..., i, later].unsqueeze(-1)
            self._views.append((t[i], d[i], low[i], high[i], rest, factors, d[i].unsqueeze(-2)))

    def choose_(self) -> torch.Tensor:
        """The moves [B, P, R], which the next call overwrites; brings T up to date."""
        moves, wanted = [], []
        for panel in self._panels:
            if compiled.is_enabled():
                work = (X[..., panel, :] for X in (self.T, self.low, self.high))
                D, T = _moved_panel(self.M[..., panel, panel], *work)
                moves.append(D)
                wanted.append(T)
            else:
                D = self._D[..., panel, :]
                for t, d, low, high, rest, factors, move in self._views[panel]:
                    torch.round(t, out=d).clamp_(low, high)
                    rest.addcmul_(factors, move, value=-1)
            if panel.stop < self.T.shape[-2]:
                later = self.T[..., panel.stop :, :]
                add_product_(later, self.M[..., panel, panel.stop :].mT, D, alpha=-1)
        if moves:
            torch.cat(moves, -2, out=self._D)
            torch.cat(wanted, -2, out=self.T)
        return self._D


@compiled.fused
def _scale_step(
    s: torch.Tensor, wanted: torch.Tensor, slope: torch.Tensor, curvature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far scales move towards the ones wanted, and what that gains: not at all where it would be a loss."""
    step = wanted - s
    gain = step * (2 * _CAUTION * slope - step * curvature)
    moves = (gain > 0) & (wanted * s > 0)
    return torch.where(moves, step, 0.0), torch.where(moves, gain, 0.0)


@compiled.fused
def _moved_panel(
    M: torch.Tensor, T: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The moves of a panel, and what its columns wanted, as one chain of values: a compiler makes one loop of it."""
    wanted = list(T.unbind(-2))
    moves: list[torch.Tensor] = []
    bounds = zip(low.unbind(-2), high.unbind(-2), strict=True)
    for i, (least, most) in enumerate(bounds):
        for j, d in enumerate(moves):
            wanted[i] = wanted[i] - M[..., j, i].unsqueeze(-1) * d
        moves.append(wanted[i].round().clamp(least, most))
    return torch.stack(moves, -2), torch.stack(wanted, -2)
