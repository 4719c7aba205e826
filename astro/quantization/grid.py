"""The grid of a quantized layer: scale and zero point of each group, and rounding to it.

Shapes: R rows (outputs), C columns (inputs), g columns a group, G = C/g groups; everything may have leading dimensions,
of layers that lie side by side.
Integers are signed, in [−2^(b−1), 2^(b−1)−1]; a weight is (q − zero) · scale (arXiv 2602.07596, eq. 1-2, zero = 0).
"""

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from astro.config import LayerScheme, SolverSettings
from astro.errors import NumericalError
from astro.linalg.batching import first_of
from astro.linalg.tiling import near_rows
from astro.model.low_rank import LowRank

__all__ = ["Grid", "QuantizedLinear", "fit_grid", "grouped", "num_candidates", "require_finite_scales"]

_PLAIN_NORM = 2.4
"""Exponent of the unweighted error, GPTQ's own choice."""
_SHRINKS = tuple(1.0 - 0.06 * i for i in range(13))
"""Candidate factors of a group's range, 1.0 to 0.28: two-bit grids want the small ones."""
_NUDGES = (-0.02, 0.02)
"""What is then added to the best of them."""


def grouped(W: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return rows [B, R, C] with their groups apart, [B, R, G, g]."""
    groups: torch.Tensor = W.unflatten(-1, (-1, group_size))
    return groups


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the weights of a layer may lie.

    Attributes:
        scale: Scale of each group, float32 [R, G], never 0, already rounded to the dtype it is stored in. A negative
            scale turns the grid around: the side that reaches one step further is then the positive one.
        zero: Zero point of each group, float32 [R, G], whole numbers in the integer range; 0 where symmetric.
        bits: Width of one weight.
        group_size: Number of columns that share a scale.
        symmetric: Whether every zero point is 0 by construction.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    group_size: int
    symmetric: bool

    @property
    def q_min(self) -> int:
        """The least integer."""
        return -(1 << (self.bits - 1))

    @property
    def q_max(self) -> int:
        """The greatest integer."""
        return (1 << (self.bits - 1)) - 1

    def quantize(self, W: torch.Tensor) -> torch.Tensor:
        """Round to the nearest point of the grid.

        Args:
            W: Weights, float32 [R, C].

        Returns:
            The integers, int8 [R, C].
        """
        V = grouped(W, self.group_size) / self.scale.unsqueeze(-1)
        return (V.round_() + self.zero.unsqueeze(-1)).clamp_(self.q_min, self.q_max).flatten(-2).to(torch.int8)

    def dequantize(self, Q: torch.Tensor) -> torch.Tensor:
        """Return the weights that integers stand for.

        Args:
            Q: Integers, int8 [R, C], on the grid's device.

        Returns:
            The weights, float32 [R, C].
        """
        V = grouped(Q, self.group_size).to(torch.float32)
        if not self.symmetric:  # zero is 0: a pass over all elements less
            V.sub_(self.zero.unsqueeze(-1))
        return V.mul_(self.scale.unsqueeze(-1)).flatten(-2)

    def to(self, device: torch.device) -> "Grid":
        """Return the grid on a device.

        Args:
            device: The device.
        """
        return dataclasses.replace(self, scale=self.scale.to(device), zero=self.zero.to(device))


def fit_grid(
    W: torch.Tensor,
    scheme: LayerScheme,
    settings: SolverSettings,
    scale_dtype: torch.dtype,
    cost: torch.Tensor | None = None,
) -> Grid:
    """Choose the scale and zero point of every group of a layer.

    The scale is rounded to `scale_dtype` before anything is quantized with it, so that what is stored is what was used.

    Args:
        W: Weights, finite, float32 [R, C].
        scheme: Width, group size and symmetry.
        settings: How scales are searched.
        scale_dtype: Dtype in which scales are stored.
        cost: What a unit squared error in each column costs, float32 [C]. Only the search `hessian` needs it.

    Returns:
        The grid, its scales possibly infinite in a narrow `scale_dtype`: see `require_finite_scales`.
    """
    group_size = scheme.columns_per_group(W.shape[-1])
    weight = None
    if settings.scale_search == "hessian":
        assert cost is not None, "the search `hessian` needs the cost of each column"
        weight = grouped(cost, group_size).unsqueeze(-3)
    tiles = (grouped(W[..., rows, :], group_size) for rows in near_rows(W))
    grids = [_fit(V, weight, scheme, settings, scale_dtype) for V in tiles]
    scale, zero = torch.cat([grid.scale for grid in grids], -2), torch.cat([grid.zero for grid in grids], -2)
    return dataclasses.replace(grids[0], scale=scale, zero=zero)


def _fit(
    V: torch.Tensor,
    weight: torch.Tensor | None,
    scheme: LayerScheme,
    settings: SolverSettings,
    scale_dtype: torch.dtype,
) -> Grid:
    """The grid of some rows [B, R, G, g], whose errors count with a weight by column [B, 1, G, g]."""
    low, high = V.amin(-1).clamp_(max=0), V.amax(-1).clamp_(min=0)
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best = _make_grid(low, high, scheme, scale_dtype, V.shape[-1])
    if settings.scale_search == "minmax":
        return best
    least, shrink = _group_error(V, best, weight), torch.ones_like(low)

    def consider(factor: torch.Tensor | float, sign: torch.Tensor | int) -> None:
        nonlocal best, least, shrink
        grid = _make_grid(low * factor, high * factor, scheme, scale_dtype, V.shape[-1])
        grid = dataclasses.replace(grid, scale=grid.scale * sign)
        error = _group_error(V, grid, weight)
        better = error < least
        scale, zero = torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero)
        best, least = dataclasses.replace(best, scale=scale, zero=zero), torch.minimum(error, least)
        shrink = torch.where(better, factor, shrink)

    for factor, sign in itertools.islice(itertools.product(_SHRINKS, _signs(scheme.symmetric, settings)), 1, None):
        consider(factor, sign)
    coarse, side = shrink, best.scale.sign()
    for nudge in _NUDGES:
        consider(coarse + nudge, side)
    return best


def num_candidates(symmetric: bool, settings: SolverSettings) -> int:
    """Return the number of scales that are tried for every group.

    Args:
        symmetric: Whether zero points are fixed at 0.
        settings: How scales are searched.
    """
    if settings.scale_search == "minmax":
        return 1
    return len(_SHRINKS) * len(_signs(symmetric, settings)) + len(_NUDGES)


def _signs(symmetric: bool, settings: SolverSettings) -> tuple[int, ...]:
    return (1, -1) if symmetric and settings.signed_scales else (1,)


def _make_grid(
    low: torch.Tensor, high: torch.Tensor, scheme: LayerScheme, scale_dtype: torch.dtype, group_size: int
) -> Grid:
    levels = scheme.num_levels - 1
    # eq. 2: a symmetric grid reaches the largest weight with its largest positive integer
    span = high / (levels // 2) if scheme.symmetric else (high - low) / levels
    smallest = torch.finfo(scale_dtype).tiny * torch.finfo(scale_dtype).eps
    # A group of zeros has no range of its own: any scale holds it, 1 is the one that stays finite when inverted.
    scale = torch.where(span > 0, span.clamp(min=smallest), 1.0).to(scale_dtype).float()
    q_min = -(scheme.num_levels // 2)
    zero = torch.zeros_like(scale) if scheme.symmetric else (q_min - low / scale).round_().clamp_(q_min, -q_min - 1)
    return Grid(scale, zero, scheme.bits, group_size, scheme.symmetric)


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
        grid: Grid of one layer, or of as many as there are names.
        names: Names of the layers, for messages.

    Raises:
        NumericalError: A scale overflowed.
    """
    name = first_of(~torch.isfinite(grid.scale).all(-1).all(-1), names)
    if name is not None:
        raise NumericalError(f"{name}: a scale is not finite in the stored dtype; the weights are too large for it")


@dataclasses.dataclass(frozen=True)
class QuantizedLinear:
    """One linear layer on its grid.

    Attributes:
        Q: The integers, int8 [R, C].
        grid: Scale and zero point of each group.
        correction: Correction of low rank that servers add to the layer's outputs; None for none. The weights that
            `dequantize` returns are without it.
    """

    Q: torch.Tensor
    grid: Grid
    correction: LowRank | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weights [R, C] on the device of the integers.

        Args:
            dtype: Dtype to which the weights, which are computed in float32, are rounded.
        """
        weight = torch.empty(self.Q.shape, dtype=dtype, device=self.Q.device)
        self.dequantize_into_(weight)
        return weight

    def dequantize_into_(self, weight: torch.Tensor) -> None:
        """Write the weights over those of a tensor, without a float32 copy of all of them on a CPU.

        Args:
            weight: The tensor [R, C] of any float dtype, on the device of the integers.
        """
        for rows in near_rows(self.Q):
            grid = dataclasses.replace(self.grid, scale=self.grid.scale[rows], zero=self.grid.zero[rows])
            weight[rows].copy_(grid.dequantize(self.Q[rows]))

    def to(self, device: torch.device) -> "QuantizedLinear":
        """Return the layer on a device.

        Args:
            device: The device.
        """
        correction = self.correction.to(device) if self.correction else None
        return QuantizedLinear(self.Q.to(device), self.grid.to(device), correction)
