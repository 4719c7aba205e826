"""What the rows of linear layers with a common input share, and the solve of some of them.

Prepared once: the factor of the Hessian, the operator of the regularizer, and the strength β, which `astro.beta`
chooses where it is to be searched. With these rows are independent, so a tile of rows can be solved anywhere. Groups of
one shape, as those of a layer's experts, are solved side by side, each with a Hessian and a β of its own.
Shapes: B groups side by side, mostly 1; R rows of all members of one together, C columns.
"""

import dataclasses
from collections.abc import Sequence

import torch

from astro.config import Quantization, Regularizer
from astro.linalg.cholesky import Factor, factorize
from astro.linalg.symmetric import layer_error
from astro.quantization import gptq, regularizer
from astro.quantization.grid import Grid, fit_grid, grouped, require_finite_scales
from astro.quantization.refine import refine
from astro.quantization.regularizer import Problem, mean_group_maximum
from astro.timing import timed

__all__ = [
    "Figures",
    "GroupOutcome",
    "LinearGroups",
    "SolvedRows",
    "compensate",
    "measure_width",
    "num_sampled",
    "prepare_groups",
    "quantize_rows",
    "sampled",
    "solve_rows",
]

_SAMPLED_ROWS = 128
"""Rows, evenly spaced over the group, that β and widths are measured on; of a small group one row in eight."""
_TINY = torch.finfo(torch.float32).tiny


@dataclasses.dataclass(frozen=True)
class Figures:
    """What is measured of each row, float32 [B, R].

    Attributes:
        error: ‖(ŵ − w)X‖².
        energy: ‖wX‖².
        maximum_before: mean group maximum of the original weights.
        maximum_after: mean group maximum of the regularized weights.
    """

    error: torch.Tensor
    energy: torch.Tensor
    maximum_before: torch.Tensor
    maximum_after: torch.Tensor


@dataclasses.dataclass(frozen=True)
class SolvedRows:
    """Some rows on their grid: integers int8 [B, R, C], the grid, figures of each row."""

    Q: torch.Tensor
    grid: Grid
    figures: Figures


@dataclasses.dataclass(frozen=True)
class GroupOutcome:
    """What was decided for all rows of a group.

    Attributes:
        beta: strength of the regularization.
        beta_gain: share of the sampled rows' error before refinement that it saved against 0; 0 if not searched.
        damping: share of the mean diagonal that the Hessian needed.
        factorizations: that were tried.
        seconds: time by phase.
    """

    beta: float
    beta_gain: float
    damping: float
    factorizations: int
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class LinearGroups:
    """What all rows of groups side by side share.

    Attributes:
        names: of each group, its members' joined by '+'.
        H: mean of xxᵀ, float32 [B, C, C].
        drift: mean of (x_s − x)xᵀ times the share that is made up for, float32 [B, C, C]; None for none.
        quantization: grid and solver, the width settled.
        scale_dtype: dtype in which scales are stored.
        factor: of the damped H; None for rounding to nearest.
        problem: regularization; None where every β is 0.
        beta: strengths of the regularization, float64 [B]; None where they are yet to be chosen.
        beta_gain: share of the sampled rows' error before refinement that each saved against 0, [B]; 0 where it was not
            searched.
        rounded: groups that are rounded to nearest for want of statistics, bool [B]: H is the identity, β 0.
        seconds: time by phase, added to by every solve.
    """

    names: tuple[str, ...]
    H: torch.Tensor
    drift: torch.Tensor | None
    quantization: Quantization
    scale_dtype: torch.dtype
    factor: Factor | None
    problem: Problem | None
    beta: torch.Tensor | None
    beta_gain: torch.Tensor
    rounded: torch.Tensor
    seconds: dict[str, float]

    def outcomes_(self) -> list[GroupOutcome]:
        """What was decided for each group, β chosen, and an even part of the time since this was last asked."""
        assert self.beta is not None
        seconds = {phase: spent / len(self.names) for phase, spent in self.spent_().items()}
        none = torch.zeros_like(self.beta)
        damping, attempts = (self.factor.damping, self.factor.attempts) if self.factor else (none, none.long())
        columns = (self.beta, self.beta_gain, damping, attempts)
        decided = zip(*(column.tolist() for column in columns), strict=True)
        return [GroupOutcome(beta, gain, damping, tried, seconds) for beta, gain, damping, tried in decided]

    def spent_(self) -> dict[str, float]:
        """Time by phase since this was last asked."""
        seconds = dict(self.seconds)
        self.seconds.clear()
        return seconds


def prepare_groups(
    names: Sequence[str],
    W: torch.Tensor,
    H: torch.Tensor,
    quantization: Quantization,
    regularization: Regularizer,
    scale_dtype: torch.dtype,
    drift: torch.Tensor | None = None,
    rounded: Sequence[bool] = (),
) -> LinearGroups:
    """Factors and regularizers of groups; β stays open where it is to be searched.

    Args:
        names: of each group, its members' joined by '+'.
        W: weights of all members of each, float32 [B, R, C].
        H: mean of xxᵀ over the calibration tokens, float32 [B, C, C].
        quantization: grid and solver, the width settled.
        regularization: what is done to the weights before.
        scale_dtype: dtype in which scales are stored.
        drift: mean of (x_s − x)xᵀ, x_s the same tokens' inputs in the source model, float32 [B, C, C].
        rounded: which groups have no statistics, their H being the identity; none where not given.

    Raises:
        NumericalError: H is zero, or cannot be factored within the damping limit.
    """
    seconds: dict[str, float] = {}
    group_size = quantization.columns_per_group(W.shape[-1])
    factor = None
    if quantization.method == "gptq":
        with timed(seconds, "factor"):
            in_order = torch.arange(W.shape[-1], device=H.device).expand(H.shape[:-1])
            order = gptq.activation_order(H) if quantization.act_order == "static" else in_order
            factor = factorize(H, order, quantization.damping, quantization.max_damping, names)
    drift = None if drift is None or factor is None else drift * quantization.compensation
    none = H.new_zeros(len(H), dtype=torch.float64)
    plain = torch.tensor(list(rounded) or [False] * len(H), device=H.device)
    groups = LinearGroups(tuple(names), H, drift, quantization, scale_dtype, factor, None, none, none, plain, seconds)
    if regularization.name == "none" or regularization.beta == 0:
        return groups
    with timed(seconds, "regularize"):
        problem = regularizer.prepare(H, mean_group_maximum(W, group_size), regularization, group_size, names)
    beta = None if regularization.beta == "auto" else torch.where(plain, none, regularization.beta)
    return dataclasses.replace(groups, problem=problem, beta=beta)


def quantize_rows(groups: LinearGroups, target: torch.Tensor) -> tuple[torch.Tensor, Grid]:
    """Fit the grid to some rows and solve them, no more.

    Args:
        groups: prepared from all rows.
        target: of these rows of each, regularized where they are to be, float32 [B, R, C].

    Returns:
        Integers int8 [B, R, C] and their grid.

    Raises:
        NumericalError: a scale overflows the dtype in which it is stored.
    """
    with timed(groups.seconds, "grid"):
        cost = groups.factor.cost if groups.factor else groups.H.diagonal(dim1=-2, dim2=-1)
        grid = fit_grid(target, groups.quantization, groups.scale_dtype, cost)
        require_finite_scales(grid, groups.names)
    if groups.factor is None:
        return grid.quantize(target), grid
    with timed(groups.seconds, "gptq"):
        return gptq.solve(target, groups.factor, grid), grid


def solve_rows(groups: LinearGroups, W: torch.Tensor) -> SolvedRows:
    """Regularize, quantize and refine some rows.

    Args:
        groups: prepared from all rows, β known.
        W: original weights of these rows of each, float32 [B, R, C]; errors are those of their compensated form.

    Raises:
        NumericalError: a scale overflows the dtype in which it is stored.
    """
    settings, seconds = groups.quantization, groups.seconds
    target = W = compensate(groups, W)
    if groups.problem is not None:
        assert groups.beta is not None
        with timed(seconds, "regularize"):
            target = regularizer.regularize(W, groups.problem, groups.beta.unsqueeze(-1))
    Q, grid = quantize_rows(groups, target)
    if groups.factor is not None and settings.refine_passes:
        with timed(seconds, "refine"):
            damping = groups.factor.damping.float() * groups.H.diagonal(dim1=-2, dim2=-1).mean(-1)
            passes, tolerance = settings.refine_passes, settings.refine_tolerance
            Q, grid, error = refine(W, Q, grid, groups.H, damping, passes, tolerance, groups.scale_dtype)
    else:
        error = layer_error(W, grid.dequantize(Q), groups.H)
    figures = Figures(
        error=error,
        energy=layer_error(W, torch.zeros_like(W), groups.H),
        maximum_before=grouped(W, grid.group_size).abs().amax(-1).mean(-1),
        maximum_after=grouped(target, grid.group_size).abs().amax(-1).mean(-1),
    )
    return SolvedRows(Q, grid, figures)


def compensate(groups: LinearGroups, W: torch.Tensor) -> torch.Tensor:
    """The weights that bring a layer's outputs back towards those of the source model.

    With x_s = x + d the inputs in the source model, W* minimizes ‖W (x + γ d) − W* x‖² + λ‖W* − W‖² over the tokens:

        W* = W + γ W (Σ d xᵀ) (H + λI)⁻¹

    Args:
        groups: prepared from all rows.
        W: original weights of some rows of each, float32 [B, R, C].

    Source: quantization error propagation, arXiv 2504.09629; asymmetric calibration, arXiv 2504.02692.
    """
    if groups.drift is None or groups.factor is None:
        return W
    with timed(groups.seconds, "compensate"):
        return W + groups.factor.solve(W @ groups.drift)


def measure_width(groups: LinearGroups, W: torch.Tensor, bits: int) -> list[float]:
    """Relative layer error of each group's sampled rows at some width: what it would cost, without solving all rows.

    Args:
        groups: prepared with any width.
        W: weights of all members of each, float32 [B, R, C].
        bits: the width. Not regularized: the best β of one width is not that of another.
    """
    quantization = dataclasses.replace(groups.quantization, bits=bits)
    measured = dataclasses.replace(groups, quantization=quantization, problem=None, seconds={})
    with timed(groups.seconds, "widths"):
        figures = solve_rows(measured, sampled(W)).figures
    errors: list[float] = (figures.error.sum(-1) / figures.energy.sum(-1).clamp(min=_TINY)).tolist()
    return errors


def num_sampled(num_rows: int) -> int:
    """Rows of a group that β and widths are measured on."""
    return min(max(num_rows // 8, 1), _SAMPLED_ROWS)


def sampled(W: torch.Tensor) -> torch.Tensor:
    """The rows that β and widths are measured on, [B, S, C] of [B, R, C]."""
    num_rows = W.shape[-2]
    return W[..., torch.linspace(0, num_rows - 1, num_sampled(num_rows), device=W.device).round().long(), :]
