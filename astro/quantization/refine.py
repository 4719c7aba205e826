"""Refinement: coordinate descent on the layer error after GPTQ, against the original weights.

GPTQ fixes a column before it sees the ones after it. Here every integer, and every scale, is chosen once more with all
others in place. For a row with error e = w − ŵ, ŵ = v s with v = q − z, the damped layer error is e A eᵀ with
A = H + λI. Along one coordinate it is a parabola. For the scale s of a group k, with the slope g = (e A)_k vᵀ and the
curvature h = v A_kk vᵀ:

    s' = s + g / h, as the stored dtype has it                  (1)
    the error falls by (s' − s) (2 g − (s' − s) h)              (2)
    (e A) ← (e A) − (s' − s) v A                                (3)

For the integer of column i of the group, in units of the scale:

    t_i = (e A)_i / (A_ii s)                                    (4)
    t_j ← t_j − d_i A_ij / A_jj for later columns j             (5)
    d_i = clamp(round(t_i), q_min − z − v_i, q_max − z − v_i)   (6)
    the error falls by A_ii s² d_i (2 t_i − d_i)                (7)

A move is made only where it lowers the error by the slopes e A at hand. They come from products of factors that may be
rounded to bfloat16 (`astro.linalg.bf16_matmul`): a slope that is a little off only matters near the middle of two grid
points, where both are as good. Rows that are not better in the end, measured in float32, stay what they were. The
damping is GPTQ's: without it a column whose input was nearly silent on the calibration text would be free to go
anywhere. Rows never meet.
Shapes: R rows, C columns, g columns a group, B layers side by side; work arrays are transposed [B, C, R], so that a
column of a layer is contiguous.
"""

import dataclasses
from typing import NamedTuple

import torch

from astro.config import SolverSettings
from astro.linalg import compiled
from astro.linalg.batching import add_product_
from astro.linalg.bf16_matmul import operand, product
from astro.linalg.panels import Panels, settle_apart
from astro.linalg.symmetric import squared_error
from astro.quantization import column_ops
from astro.quantization.grid import QuantizedLinear, grouped

__all__ = ["refine"]

_SPAN = 256
"""Columns between two products with all columns, at most, or a whole group. It is part of the arithmetic."""
_BLOCK = 128
"""Columns of one group between two products with the rest of a span. It is at least half of a span: where a span holds
several groups, each of them is one block then."""
_CAUTION = 1 - 1e-4
"""Share of the way to a parabola's minimum that is gone, so that rounding in float32 never takes a loss for a
gain: an integer only moves past the middle of two grid points."""


def refine(
    W: torch.Tensor,
    quantized: QuantizedLinear,
    H: torch.Tensor,
    damping: torch.Tensor,
    settings: SolverSettings,
    scale_dtype: torch.dtype,
) -> tuple[QuantizedLinear, torch.Tensor]:
    """Lower the layer error of quantized rows by passes over their scales and integers.

    Args:
        W: Original weights, float32 [B, R, C], or [R, C].
        quantized: Rows as GPTQ left them, [B, R, C]. Their integers and scales change, their zero points stay.
        H: Undamped Hessians, float32 [B, C, C].
        damping: Damping λ of each Hessian, float32 [B].
        settings: Settings that say how many passes are made at most, and which gain is too small for another pass.
        scale_dtype: Dtype in which scales are stored; every new scale is exact in it.

    Returns:
        The refined rows, and the layer error of each, float32 [B, R]. In the damped layer error, as float32 has it, no
        row is worse than it was.
    """
    Q, grid = quantized.Q, quantized.grid
    zero = grid.zero.mT.contiguous()
    state = (_StateByKernels if compiled.run_by_kernels() else _State)(
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
    for _ in range(settings.refine_passes):
        gain, error = state.sweep()
        if not bool((gain >= settings.refine_tolerance * error).any()):
            break
    after, damped_after = state.errors()
    is_better = damped_after < damped_before
    rows = is_better.unsqueeze(-1)
    moved = (grouped(state.V.mT, grid.group_size) + grid.zero.unsqueeze(-1)).flatten(-2).to(torch.int8)
    scale = torch.where(rows, state.scale.mT, grid.scale).contiguous()
    refined = QuantizedLinear(torch.where(rows, moved, Q), dataclasses.replace(grid, scale=scale))
    return refined, torch.where(is_better, after, before)


@dataclasses.dataclass
class _State:
    """Rows under refinement.

    Attributes:
        V: The integers from their zero points, v = q − z, [B, C, R].
        E: The errors of the weights, w − ŵ, [B, C, R].
        scale: The scale of each group, [B, G, R]. Like low and high it is contiguous: a row is read and written group
            by group, on a GPU by kernels that want their rows aligned.
        low: The least V of each group, [B, G, R].
        high: The greatest V of each group, [B, G, R].
        H: The undamped Hessians, [B, C, C].
        damping: Damping λ of each Hessian, [B, 1, 1].
        group_size: Number of columns in a group.
        scale_dtype: Dtype in which scales are stored.
        diagonal: The diagonal of H + λI, [B, C, 1].
        caution: `_CAUTION` over the diagonal, [B, C, 1].
        H_operand: H as `product` takes it.
        E_operand: E as `product` takes it, kept up to date. Where that is float32 it is E itself.
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
    caution: torch.Tensor = dataclasses.field(init=False)
    H_operand: torch.Tensor = dataclasses.field(init=False)
    E_operand: torch.Tensor = dataclasses.field(init=False)
    _work: dict[int, "Panels[_Columns]"] = dataclasses.field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.H_operand, self.E_operand = operand(self.H), operand(self.E)
        self.diagonal = self.H.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) + self.damping
        self.caution = _CAUTION / self.diagonal

    def slopes(self, rows: slice) -> torch.Tensor:
        """Return rows of (H + λI) E."""
        return product(self.H_operand[..., rows, :], self.E_operand).addcmul_(self.damping, self.E[..., rows, :])

    def errors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the layer error of each row, and the damped one, [B, R]."""
        error = squared_error(self.E.mT, self.H)
        return error, error + self.damping.squeeze(-1) * torch.linalg.vecdot(self.E, self.E, dim=-2)

    def lower_(self, rows: slice, change: torch.Tensor) -> None:
        """Take what was added to ŵ off the errors of the weights."""
        E = self.E[..., rows, :].sub_(change)
        if self.E_operand is not self.E:
            self.E_operand[..., rows, :].copy_(E)

    def sweep(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Make one pass over all scales and integers.

        Returns:
            By how much the error of each layer fell, and about what it was before, both [B]. The latter is the sum of
            each group's share as the pass met it, which costs no product of its own.
        """
        nothing = torch.zeros_like(self.scale[..., 0, :])
        sums = _Sums(gain=nothing, error=nothing.clone())
        num_groups, size = self.scale.shape[-2], self.group_size
        step = max(1, _SPAN // size)
        for first in range(0, num_groups, step):
            last = min(first + step, num_groups)
            stop = last * size
            G = self.slopes(slice(first * size, stop))  # of the columns that are yet to come
            for k in range(first, last):
                group = slice(k * size, (k + 1) * size)
                scale_change = self._move_scale(k, group, G[..., :size, :], sums)
                for start in range(group.start, group.stop, _BLOCK):
                    block = slice(start, min(start + _BLOCK, group.stop))
                    change = self._move_integers(k, block, G[..., : block.stop - start, :], sums)
                    G = G[..., block.stop - start :, :]
                    if block.stop < stop:
                        # Beyond the group, of which this is all then, the change of its scale counts as well.
                        change = change if block.stop < group.stop else change.add_(scale_change)
                        add_product_(G, self.H[..., block.stop : stop, block], change, alpha=-1)
        return sums.gain.sum(-1), sums.error.sum(-1)

    def _move_scale(self, k: int, group: slice, G: torch.Tensor, sums: "_Sums") -> torch.Tensor:
        """Refit a group's scale, and bring the group's slopes up to date.

        Args:
            k: The index of the group.
            group: Its columns.
            G: Their slopes, the rows of (H + λI) E, [B, g, R].
            sums: What the pass has gained and met so far, which is added to.

        Returns:
            The change of ŵ, [B, g, R].
        """
        sums.error.add_(torch.linalg.vecdot(self.E[..., group, :], G, dim=-2))
        V, s = self.V[..., group, :], self.scale[..., k, :]
        HV = (self.H[..., group, group] @ V).addcmul_(self.damping, V)
        slope, curvature = torch.linalg.vecdot(G, V, dim=-2), torch.linalg.vecdot(HV, V, dim=-2)
        best = torch.addcdiv(s, slope, curvature.clamp(min=torch.finfo(torch.float32).tiny))  # eq. 1
        step, gain = _scale_step(s, best.to(self.scale_dtype).float(), slope, curvature)
        s += step
        D = V * step.unsqueeze(-2)
        self.lower_(group, D)
        G.addcmul_(HV, step.unsqueeze(-2), value=-1)  # eq. 3
        sums.gain.add_(gain)
        return D

    def _move_integers(self, k: int, block: slice, G: torch.Tensor, sums: "_Sums") -> torch.Tensor:
        """Choose the integers of some columns of a group anew, one column after the other.

        Args:
            k: The index of the group.
            block: The columns.
            G: Their slopes, the rows of (H + λI) E, [B, P, R].
            sums: What the pass has gained so far, which is added to.

        Returns:
            The change of ŵ, [B, P, R].
        """
        V, s = self.V[..., block, :], self.scale[..., k, :].unsqueeze(-2)
        size = V.shape[-2]
        work = self._work.get(size) or self._work.setdefault(size, _block(V))
        T, low, high, D = work.arrays
        caution = self.caution[..., block, :]
        torch.div(G, s, out=T).mul_(caution)  # eq. 4
        torch.mul(self.H[..., block, block], caution.mT.neg(), out=work.M)  # eq. 5
        torch.sub(self.low[..., k, :].unsqueeze(-2), V, out=low)
        torch.sub(self.high[..., k, :].unsqueeze(-2), V, out=high)
        work.settle_()
        V += D
        # What each move gained, T being what it was when its column came to its turn; infinite for the least of scales.
        gains = torch.linalg.vecdot(D, torch.sub(T.mul_(2), D, alpha=_CAUTION).div_(caution), dim=-2)  # eq. 7
        change = D * s
        self.lower_(block, change)
        sums.gain.addcmul_(gains.nan_to_num_(), s.squeeze(-2).square())
        return change


@dataclasses.dataclass(frozen=True)
class _Sums:
    """What a pass adds up for each row.

    Attributes:
        gain: By how much the error has fallen, [B, R].
        error: The error, each group's share as the pass met it, [B, R].
    """

    gain: torch.Tensor
    error: torch.Tensor


class _StateByKernels(_State):
    """The same, where all that is done to a group's scale or to a block of integers is one kernel."""

    def _move_scale(self, k: int, group: slice, G: torch.Tensor, sums: _Sums) -> torch.Tensor:
        V = self.V[..., group, :]
        change: torch.Tensor = column_ops.move_scale(
            V, self.E[..., group, :], self._rounded(group), G, self.H[..., group, group] @ V, self.damping.flatten(),
            self.scale[..., k, :], sums.gain, sums.error, _CAUTION, self.scale_dtype,
        )  # fmt: skip
        return change

    def _move_integers(self, k: int, block: slice, G: torch.Tensor, sums: _Sums) -> torch.Tensor:
        change: torch.Tensor = column_ops.move_columns(
            self.H[..., block, block], self.V[..., block, :], self.E[..., block, :], self._rounded(block), G,
            self.caution[..., block, 0], self.scale[..., k, :], self.low[..., k, :], self.high[..., k, :], sums.gain,
            _CAUTION,
        )  # fmt: skip
        return change

    def _rounded(self, columns: slice) -> torch.Tensor | None:
        """Columns of E in bfloat16, None where products take it as it is."""
        return None if self.E_operand is self.E else self.E_operand[..., columns, :]


class _Columns(NamedTuple):
    """What belongs to some columns of a group, [B, P, R], or to a single one, [B, 1, R].

    Attributes:
        T: By how much each integer wants to move; afterwards, by how much it did when it came to its turn.
        low: Least moves.
        high: Greatest moves.
        D: The moves.
    """

    T: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    D: torch.Tensor


def _move_(column: _Columns) -> torch.Tensor:
    """Move the integers of one column as far as they want; later ones want that much less."""
    t, low, high, d = column
    return torch.round(t, out=d).clamp_(low, high)  # eq. 6


@compiled.fused
def _moved_panel(M: torch.Tensor, *arrays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The moves of a panel, and what its columns wanted, for a compiler."""
    columns = settle_apart(_Columns(*arrays), M, _move_)
    return torch.cat([column.D for column in columns], -2), torch.cat([column.T for column in columns], -2)


def _block(like: torch.Tensor) -> Panels[_Columns]:
    """A block of columns for integers of some shape."""
    arrays = _Columns(*(like.new_empty(like.shape) for _ in _Columns._fields))
    return Panels(arrays, (arrays.D, arrays.T), _move_, _moved_panel)


@compiled.fused
def _scale_step(
    s: torch.Tensor, wanted: torch.Tensor, slope: torch.Tensor, curvature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far scales move towards the wanted ones, and what that gains. None moves where that were a loss."""
    step = wanted - s
    gain = step * (2 * _CAUTION * slope - step * curvature)  # eq. 2
    moves = (gain > 0) & (wanted * s > 0)
    return torch.where(moves, step, 0.0), torch.where(moves, gain, 0.0)
