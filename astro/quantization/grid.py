"""The grid of a quantized layer: scale and zero point of each group, and rounding to it.

Shapes: R rows (outputs), C columns (inputs), g columns a group, G = C/g groups; everything may have leading dimensions,
of layers that lie side by side.
Integers are signed, in [−2^(b−1), 2^(b−1)−1]; a weight is (q − zero) · scale (arXiv 2602.07596, eq. 1-2, zero = 0).
"""

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from astro.config import Quantization
from astro.errors import NumericalError
from astro.linalg.batching import first_of
from astro.linalg.tiling import near_rows

__all__ = ["Grid", "QuantizedLinear", "fit_grid", "grouped", "num_candidates", "require_finite_scales"]

_PLAIN_NORM = 2.4
"""Exponent of the unweighted error, GPTQ's own choice."""
_SHRINKS = tuple(1.0 - 0.06 * i for i in range(13))
"""Candidate factors of a group's range, 1.0 to 0.28: two-bit grids want the small ones."""
_NUDGES = (-0.02, 0.02)
"""What is then added to the best of them."""


def grouped(W: torch.Tensor, group_size: int) -> torch.Tensor:
    """Rows [B, R, C] with their groups apart, [B, R, G, g]."""
    groups: torch.Tensor = W.unflatten(-1, (-1, group_size))
    return groups


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the weights of a layer may lie.

    Attributes:
        scale: float32 [R, G], never 0, already rounded to the dtype it is stored in. A negative scale turns the
            grid around: the side that reaches one step further is then the positive one.
        zero: float32 [R, G], whole numbers in the integer range; 0 where symmetric.
        bits: width of one weight.
        group_size: columns that share a scale.
        symmetric: whether every zero point is 0 by construction.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    group_size: int
    symmetric: bool

    @property
    def q_min(self) -> int:
        """Least integer."""
        return -(1 << (self.bits - 1))

    @property
    def q_max(self) -> int:
        """Greatest integer."""
        return (1 << (self.bits - 1)) - 1

    def quantize(self, W: torch.Tensor) -> torch.Tensor:
        """Round to the nearest point of the grid.

        Args:
            W: float32 [R, C].

        Returns:
            int8 [R, C].
        """
        V = grouped(W, self.group_size) / self.scale.unsqueeze(-1)
        return (V.round_() + self.zero.unsqueeze(-1)).clamp_(self.q_min, self.q_max).flatten(-2).to(torch.int8)

    def dequantize(self, Q: torch.Tensor) -> torch.Tensor:
        """The weights that integers stand for.

        Args:
            Q: int8 [R, C].

        Returns:
            float32 [R, C].
        """
        V = grouped(Q, self.group_size).float()
        return ((V - self.zero.unsqueeze(-1)) * self.scale.unsqueeze(-1)).flatten(-2)


def fit_grid(
    W: torch.Tensor, settings: Quantization, scale_dtype: torch.dtype, cost: torch.Tensor | None = None
) -> Grid:
    """Choose the scale and zero point of every group of a layer.

    The scale is rounded to `scale_dtype` before anything is quantized with it, so that what is stored is what was used.

    Args:
        W: float32 [R, C], finite.
        settings: bits, group size, symmetry and how scales are searched.
        scale_dtype: dtype in which scales are stored.
        cost: of a unit squared error in each column, float32 [C]; needed for the search `hessian` alone.

    Returns:
        The grid, its scales possibly infinite in a narrow `scale_dtype`: see `require_finite_scales`.
    """
    group_size = settings.columns_per_group(W.shape[-1])
    weight = None
    if settings.scale_search == "hessian":
        assert cost is not None, "the search `hessian` needs the cost of each column"
        weight = grouped(cost, group_size).unsqueeze(-3)
    grids = [_fit(grouped(W[..., rows, :], group_size), weight, settings, scale_dtype) for rows in near_rows(W)]
    scale, zero = torch.cat([grid.scale for grid in grids], -2), torch.cat([grid.zero for grid in grids], -2)
    return dataclasses.replace(grids[0], scale=scale, zero=zero)


def _fit(V: torch.Tensor, weight: torch.Tensor | None, settings: Quantization, scale_dtype: torch.dtype) -> Grid:
    """The grid of some rows [B, R, G, g], whose errors count with a weight by column [B, 1, G, g]."""
    low, high = V.amin(-1).clamp_(max=0), V.amax(-1).clamp_(min=0)
    if settings.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best = _make_grid(low, high, settings, scale_dtype, V.shape[-1])
    if settings.scale_search == "minmax":
        return best
    least, shrink = _group_error(V, best, weight), torch.ones_like(low)

    def consider(factor: torch.Tensor | float, sign: torch.Tensor | int) -> None:
        nonlocal best, least, shrink
        grid = _make_grid(low * factor, high * factor, settings, scale_dtype, V.shape[-1])
        grid = dataclasses.replace(grid, scale=grid.scale * sign)
        error = _group_error(V, grid, weight)
        better = error < least
        scale, zero = torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero)
        best, least = dataclasses.replace(best, scale=scale, zero=zero), torch.minimum(error, least)
        shrink = torch.where(better, factor, shrink)

    for factor, sign in itertools.islice(itertools.product(_SHRINKS, _signs(settings)), 1, None):
        consider(factor, sign)
    coarse, side = shrink, best.scale.sign()
    for nudge in _NUDGES:
        consider(coarse + nudge, side)
    return best


def num_candidates(settings: Quantization) -> int:
    """Scales that are tried for every group."""
    return 1 if settings.scale_search == "minmax" else len(_SHRINKS) * len(_signs(settings)) + len(_NUDGES)


def _signs(settings: Quantization) -> tuple[int, ...]:
    return (1, -1) if settings.symmetric and settings.signed_scales else (1,)


def _make_grid(
    low: torch.Tensor, high: torch.Tensor, settings: Quantization, scale_dtype: torch.dtype, group_size: int
) -> Grid:
    levels = (1 << settings.width) - 1
    # eq. 2: a symmetric grid reaches the largest weight with its largest positive integer
    span = high / (levels // 2) if settings.symmetric else (high - low) / levels
    smallest = torch.finfo(scale_dtype).tiny * torch.finfo(scale_dtype).eps
    # A group of zeros has no range of its own: any scale holds it, 1 is the one that stays finite when inverted.
    scale = torch.where(span > 0, span.clamp(min=smallest), 1.0).to(scale_dtype).float()
    q_min = -(1 << (settings.width - 1))
    zero = torch.zeros_like(scale) if settings.symmetric else (q_min - low / scale).round_().clamp_(q_min, -q_min - 1)
    return Grid(scale, zero, settings.width, group_size, settings.symmetric)


def _group_error(V: torch.Tensor, grid: Grid, weight: torch.Tensor | None) -> torch.Tensor:
    """Error of each group [R, G] for V [R, G, g]: squares weighted by column [1, G, g], or the plain norm."""
    scale, zero = grid.scale.unsqueeze(-1), grid.zero.unsqueeze(-1)
    E = (V / scale).round_()
    if grid.symmetric:  # zero is 0: two passes over all elements less
        E.clamp_(grid.q_min, grid.q_max)
    else:
        E.add_(zero).clamp_(grid.q_min, grid.q_max).sub_(zero)
    E.mul_(scale).sub_(V)
    return E.abs_().pow_(_PLAIN_NORM).sum(-1) if weight is None else E.square_().mul_(weight).sum(-1)


def require_finite_scales(grid: Grid, names: Sequence[str]) -> None:
    """Refuse a grid that its storage dtype cannot hold.

    Args:
        grid: of one layer, or of as many as there are names.
        names: for messages.

    Raises:
        NumericalError: a scale overflowed.
    """
    name = first_of(~torch.isfinite(grid.scale).all(-1).all(-1), names)
    if name is not None:
        raise NumericalError(f"{name}: a scale is not finite in the stored dtype; the weights are too large for it")


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
