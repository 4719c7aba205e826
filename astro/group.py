"""What the rows of a group of linear layers share, and the solve of some of them.

Prepared once: the factor of the Hessian, the operator of the regularizer, and the strength β, which `astro.beta`
chooses where it is to be searched. With these rows are independent, so a tile of rows can be solved anywhere. Shapes:
R rows of all members together, C columns.
"""

import dataclasses

import torch

from astro import gptq, regularizer
from astro.config import Quantization, Regularizer
from astro.grid import Grid, fit_grid, grouped, require_finite_scales
from astro.hessian import Factor, factorize, layer_error
from astro.refine import refine
from astro.regularizer import Problem, mean_group_maximum
from astro.report import timed

__all__ = [
    "Figures",
    "GroupOutcome",
    "LinearGroup",
    "SolvedRows",
    "compensate",
    "measure_width",
    "num_sampled",
    "prepare_group",
    "sampled",
    "solve_rows",
]

_SAMPLED_ROWS = 256
"""Rows, evenly spaced over the group, that β and widths are measured on; of a small group one row in eight."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """What is measured of each row, float32 [R].

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
    """Some rows on their grid: integers int8 [R, C], the grid, figures of each row."""

    Q: torch.Tensor
    grid: Grid
    figures: Figures


@dataclasses.dataclass(frozen=True)
class GroupOutcome:
    """What was decided for all rows of a group.

    Attributes:
        beta: strength of the regularization.
        beta_gain: share of the sampled rows' error that it saved against 0; 0 where it was not searched.
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
class LinearGroup:
    """What all rows of a group share.

    Attributes:
        name: names of the members, joined by '+'.
        H: mean of xxᵀ, float32 [C, C].
        drift: mean of (x_s − x)xᵀ times the share that is made up for, float32 [C, C]; None for none.
        quantization: grid and solver, the width settled.
        scale_dtype: dtype in which scales are stored.
        factor: of the damped H; None for rounding to nearest.
        problem: regularization; None where β is 0.
        beta: strength of the regularization; None where it is yet to be chosen.
        beta_gain: share of the sampled rows' error that it saved against 0; 0 where it was not searched.
        seconds: time by phase, added to by every solve.
    """

    name: str
    H: torch.Tensor
    drift: torch.Tensor | None
    quantization: Quantization
    scale_dtype: torch.dtype
    factor: Factor | None
    problem: Problem | None
    beta: float | None
    beta_gain: float
    seconds: dict[str, float]

    def outcome_(self) -> GroupOutcome:
        """What was decided, β chosen, and the time since this was last asked."""
        assert self.beta is not None
        damping, attempts = (self.factor.damping, self.factor.attempts) if self.factor else (0.0, 0)
        return GroupOutcome(self.beta, self.beta_gain, damping, attempts, self.spent_())

    def spent_(self) -> dict[str, float]:
        """Time by phase since this was last asked."""
        seconds = dict(self.seconds)
        self.seconds.clear()
        return seconds


def prepare_group(
    name: str,
    W: torch.Tensor,
    H: torch.Tensor,
    quantization: Quantization,
    regularization: Regularizer,
    scale_dtype: torch.dtype,
    drift: torch.Tensor | None = None,
) -> LinearGroup:
    """Factor and regularizer of a group; β stays open where it is to be searched.

    Args:
        name: names of the members, joined by '+'.
        W: weights of all members, float32 [R, C].
        H: mean of xxᵀ over the calibration tokens, float32 [C, C].
        quantization: grid and solver, the width settled.
        regularization: what is done to the weights before.
        scale_dtype: dtype in which scales are stored.
        drift: mean of (x_s − x)xᵀ, x_s the same tokens' inputs in the source model, float32 [C, C].

    Raises:
        NumericalError: H is zero, or cannot be factored within the damping limit.
    """
    seconds: dict[str, float] = {}
    group_size = quantization.columns_per_group(W.shape[1])
    factor = None
    if quantization.method == "gptq":
        with timed(seconds, "factor"):
            in_order = torch.arange(len(H), device=H.device)
            order = gptq.activation_order(H) if quantization.act_order == "static" else in_order
            factor = factorize(H, order, quantization.damping, quantization.max_damping, name)
    drift = None if drift is None or factor is None else drift * quantization.compensation
    group = LinearGroup(name, H, drift, quantization, scale_dtype, factor, None, 0.0, 0.0, seconds)
    if regularization.name == "none" or regularization.beta == 0:
        return group
    with timed(seconds, "regularize"):
        problem = regularizer.prepare(H, mean_group_maximum(W, group_size), regularization, group_size, name)
    beta = None if regularization.beta == "auto" else regularization.beta
    return dataclasses.replace(group, problem=problem, beta=beta)


def solve_rows(group: LinearGroup, W: torch.Tensor, target: torch.Tensor | None = None) -> SolvedRows:
    """Regularize, fit the grid, solve and refine some rows.

    Args:
        group: prepared from all rows.
        W: original weights of these rows, float32 [R, C]; errors are those of their compensated form.
        target: their regularized form [R, C], where it is known already; else the group's β must be.

    Raises:
        NumericalError: a scale overflows the dtype in which it is stored.
    """
    settings, seconds = group.quantization, group.seconds
    W = compensate(group, W)
    if target is None:
        target = W
        if group.problem is not None:
            assert group.beta is not None
            with timed(seconds, "regularize"):
                target = regularizer.regularize(W, group.problem, group.beta)
    with timed(seconds, "grid"):
        cost = group.factor.cost if group.factor else group.H.diagonal()
        grid = fit_grid(target, settings, group.scale_dtype, cost)
        require_finite_scales(grid, group.name)
    if group.factor is None:
        Q = grid.quantize(target)
    else:
        with timed(seconds, "gptq"):
            Q = gptq.solve(target, group.factor, grid)
        with timed(seconds, "refine"):
            damping = group.factor.damping * group.H.diagonal().mean()
            passes, tolerance = settings.refine_passes, settings.refine_tolerance
            Q, grid = refine(W, Q, grid, group.H, damping, passes, tolerance, group.scale_dtype)
    figures = Figures(
        error=layer_error(W, grid.dequantize(Q), group.H),
        energy=layer_error(W, torch.zeros_like(W), group.H),
        maximum_before=grouped(W, grid.group_size).abs().amax(-1).mean(-1),
        maximum_after=grouped(target, grid.group_size).abs().amax(-1).mean(-1),
    )
    return SolvedRows(Q, grid, figures)


def compensate(group: LinearGroup, W: torch.Tensor) -> torch.Tensor:
    """The weights that bring a layer's outputs back towards those of the source model.

    With x_s = x + d the inputs in the source model, W* minimizes ‖W (x + γ d) − W* x‖² + λ‖W* − W‖² over the tokens:

        W* = W + γ W (Σ d xᵀ) (H + λI)⁻¹

    Args:
        group: prepared from all rows.
        W: original weights of some rows, float32 [R, C].

    Source: quantization error propagation, arXiv 2504.09629; asymmetric calibration, arXiv 2504.02692.
    """
    if group.drift is None or group.factor is None:
        return W
    with timed(group.seconds, "compensate"):
        return W + group.factor.solve(W @ group.drift)


def measure_width(group: LinearGroup, W: torch.Tensor, bits: int) -> float:
    """Relative layer error of sampled rows at some width: what it would cost, without solving all rows.

    Args:
        group: prepared with any width.
        W: weights of all members, float32 [R, C].
        bits: the width. Not regularized: the best β of one width is not that of another.
    """
    quantization = dataclasses.replace(group.quantization, bits=bits)
    measured = dataclasses.replace(group, quantization=quantization, problem=None, beta=0.0, seconds={})
    with timed(group.seconds, "widths"):
        figures = solve_rows(measured, sampled(W)).figures
    return float(figures.error.sum() / figures.energy.sum().clamp(min=torch.finfo(torch.float32).tiny))


def num_sampled(num_rows: int) -> int:
    """Rows of a group that β and widths are measured on."""
    return min(max(num_rows // 8, 1), _SAMPLED_ROWS)


def sampled(W: torch.Tensor) -> torch.Tensor:
    """The rows that β and widths are measured on, [S, C] of [R, C]."""
    return W[torch.linspace(0, len(W) - 1, num_sampled(len(W)), device=W.device).round().long()]
