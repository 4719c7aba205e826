"""What the rows of linear layers with a common input share, and the solve of some of them.

Layers that read one input are an input group. Prepared once for it are the factor of the Hessian, the operator of the
regularizer, and the strength β, which `beta_search` chooses where it is to be searched. With these, rows are
independent, so a tile of rows can be solved anywhere. Input groups of one shape, like those of a layer's experts, are
solved side by side, each with its Hessian and its β.
Shapes: B input groups side by side, mostly 1; R rows of all members of an input group together, C columns.
"""

import dataclasses
from collections.abc import Sequence

import torch

from astro.config import LayerScheme
from astro.linalg.cholesky import Factor, factorize
from astro.linalg.symmetric import layer_error
from astro.quantization import gptq, regularizer
from astro.quantization.grid import Grid, QuantizedLinear, fit_grid, grouped, require_finite_scales
from astro.quantization.output_error import output_error
from astro.quantization.recipe import Figures, InputGroupOutcome, InputMoments, Recipe, SolvedRows
from astro.quantization.refine import refine
from astro.quantization.regularizer import Problem, mean_group_maximum
from astro.timing import timed

__all__ = [
    "InputGroups",
    "behind_errors",
    "compensate",
    "factor_input_groups",
    "measure_width",
    "num_sample_rows",
    "prepare_input_groups",
    "quantize_rows",
    "reproducible_share",
    "sample_rows",
    "solve_rows",
    "with_regularizer",
]

_SAMPLED_ROWS = 128
"""Rows, evenly spaced over the input group, that β and widths are measured on; where there are few, one in eight."""
_TINY = torch.finfo(torch.float32).tiny


@dataclasses.dataclass(frozen=True)
class InputGroups:
    """What all rows of input groups side by side share.

    Attributes:
        names: Name of each input group: those of its members, joined by '+'.
        inputs: What calibration learned of the inputs; the drift is None where nothing is made up for.
        share: Share of the drift that is made up for, float32 [B]. It is kept apart, because a drift that is scaled
            would be another matrix of columns × columns.
        scheme: The grid of all members.
        recipe: How they are quantized.
        factor: Factor of the damped H; None for rounding to nearest.
        problem: The regularization; None where every β is 0.
        beta: Strength of the regularization of each, float64 [B]; None where they are yet to be chosen.
        beta_gain: Share of the sampled rows' error before refinement that each β saved against 0, [B]; 0 where it was
            not searched.
        lacks_statistics: Input groups that are rounded to nearest for want of statistics, bool [B]. Their H is the
            identity, their β is 0.
        seconds: Time by phase, to which every solve adds.
    """

    names: tuple[str, ...]
    inputs: InputMoments
    share: torch.Tensor
    scheme: LayerScheme
    recipe: Recipe
    factor: Factor | None
    problem: Problem | None
    beta: torch.Tensor | None
    beta_gain: torch.Tensor
    lacks_statistics: torch.Tensor
    seconds: dict[str, float]

    @property
    def H(self) -> torch.Tensor:
        """Mean of x̂x̂ᵀ, float32 [B, C, C]."""
        return self.inputs.H

    @property
    def drift(self) -> torch.Tensor | None:
        """Mean of (x_s − x)x̂ᵀ, float32 [B, C, C]; None where errors made before are not made up for."""
        return self.inputs.drift

    def outcomes_(self) -> list[InputGroupOutcome]:
        """Return what was decided for each input group, with an even part of the time since this was last asked."""
        assert self.beta is not None
        seconds = {phase: spent / len(self.names) for phase, spent in self.spent_().items()}
        none = torch.zeros_like(self.beta)
        damping, attempts = (self.factor.damping, self.factor.attempts) if self.factor else (none, none.long())
        columns = (self.beta, self.beta_gain, damping, attempts)
        decided = zip(*(column.tolist() for column in columns), strict=True)
        return [InputGroupOutcome(beta, gain, damping, tried, seconds) for beta, gain, damping, tried in decided]

    def spent_(self) -> dict[str, float]:
        """Return the time by phase since this was last asked."""
        seconds = dict(self.seconds)
        self.seconds.clear()
        return seconds


def prepare_input_groups(
    names: Sequence[str], W: torch.Tensor, inputs: InputMoments, scheme: LayerScheme, recipe: Recipe
) -> InputGroups:
    """Compute what all rows of input groups share; β stays open where it is to be searched.

    Args:
        names: Name of each input group: those of its members, joined by '+'.
        W: Weights of all members of each, float32 [B, R, C].
        inputs: What calibration learned of their inputs.
        scheme: The grid of all members.
        recipe: How they are quantized.

    Raises:
        NumericalError: H is zero, or cannot be factored within the damping limit.
    """
    return with_regularizer(factor_input_groups(names, inputs, scheme, recipe), W)


def factor_input_groups(names: Sequence[str], inputs: InputMoments, scheme: LayerScheme, recipe: Recipe) -> InputGroups:
    """Compute what all rows of input groups share, but for the regularizer's operator.

    Args:
        names: Name of each input group: those of its members, joined by '+'.
        inputs: What calibration learned of their inputs. Where the share of the drift that is made up for is measured,
            it is 1 in the result.
        scheme: The grid of all members.
        recipe: How they are quantized.

    Raises:
        NumericalError: H is zero, or cannot be factored within the damping limit.
    """
    seconds: dict[str, float] = {}
    H, solver = inputs.H, recipe.solver
    factor = None
    if solver.method == "gptq":
        with timed(seconds, "factor", H.device):
            in_order = torch.arange(H.shape[-1], device=H.device).expand(H.shape[:-1])
            order = gptq.activation_order(H) if solver.act_order == "static" else in_order
            factor = factorize(H, order, solver.damping, solver.max_damping, names)
    share = H.new_full((len(H),), 1.0 if solver.compensation == "auto" else solver.compensation)
    none = H.new_zeros(len(H), dtype=torch.float64)
    lacking = torch.tensor(list(inputs.lacks_statistics) or [False] * len(H), device=H.device)
    if factor is None:
        inputs = dataclasses.replace(inputs, drift=None)
    return InputGroups(tuple(names), inputs, share, scheme, recipe, factor, None, none, none, lacking, seconds)


def with_regularizer(input_groups: InputGroups, W: torch.Tensor) -> InputGroups:
    """Prepare the regularizer, if there is any; β becomes open where it is to be searched.

    Its operator is a matrix of columns × columns. Who has to measure something else first does so before.

    Args:
        input_groups: The input groups, factored.
        W: Weights of all members of each, float32 [B, R, C].

    Raises:
        NumericalError: H + ρI is not positive definite.
    """
    H, regularization = input_groups.H, input_groups.recipe.regularizer
    if regularization.name == "none" or regularization.beta == 0:
        return input_groups
    group_size = input_groups.scheme.columns_per_group(W.shape[-1])
    with timed(input_groups.seconds, "regularize", W.device):
        unit = mean_group_maximum(W, group_size)
        problem = regularizer.prepare(H, unit, regularization, group_size, input_groups.names)
    lacking, none = input_groups.lacks_statistics, torch.zeros_like(input_groups.beta_gain)
    beta = None if regularization.beta == "auto" else torch.where(lacking, none, regularization.beta)
    return dataclasses.replace(input_groups, problem=problem, beta=beta)


def quantize_rows(input_groups: InputGroups, target: torch.Tensor) -> tuple[torch.Tensor, Grid]:
    """Fit the grid to some rows and solve them, no more.

    Args:
        input_groups: The input groups, prepared from all rows.
        target: Weights of some rows of each, regularized where they are to be, float32 [B, R, C].

    Returns:
        The integers int8 [B, R, C] and their grid.

    Raises:
        NumericalError: A scale overflows the dtype in which it is stored.
    """
    with timed(input_groups.seconds, "grid", target.device):
        cost = input_groups.factor.cost if input_groups.factor else input_groups.H.diagonal(dim1=-2, dim2=-1)
        grid = fit_grid(target, input_groups.scheme, input_groups.recipe.solver, input_groups.recipe.scale_dtype, cost)
        require_finite_scales(grid, input_groups.names)
    if input_groups.factor is None:
        return grid.quantize(target), grid
    with timed(input_groups.seconds, "gptq", target.device):
        return gptq.solve(target, input_groups.factor, grid), grid


def solve_rows(input_groups: InputGroups, W: torch.Tensor) -> SolvedRows:
    """Regularize, quantize and refine some rows.

    Args:
        input_groups: The input groups, prepared from all rows, their β known.
        W: Original weights of some rows of each, float32 [B, R, C]. For errors see `output_error`.

    Raises:
        NumericalError: A scale overflows the dtype in which it is stored.
    """
    settings, seconds = input_groups.recipe.solver, input_groups.seconds
    intended = behind_errors(input_groups, W)
    target = W = _behind_rounding(input_groups, intended)
    if input_groups.problem is not None:
        assert input_groups.beta is not None
        with timed(seconds, "regularize", W.device):
            target = regularizer.regularize(W, input_groups.problem, input_groups.beta.unsqueeze(-1))
    Q, grid = quantize_rows(input_groups, target)
    if input_groups.factor is not None and settings.refine_passes:
        with timed(seconds, "refine", W.device):
            damping = input_groups.factor.damping.float() * input_groups.H.diagonal(dim1=-2, dim2=-1).mean(-1)
            quantized = QuantizedLinear(Q, grid)
            refined, error = refine(W, quantized, input_groups.H, damping, settings, input_groups.recipe.scale_dtype)
            Q, grid = refined.Q, refined.grid
    else:
        error = layer_error(W, grid.dequantize(Q), input_groups.H)
    error, energy = output_error(input_groups.inputs, intended, QuantizedLinear(Q, grid), error)
    figures = Figures(
        error=error,
        energy=energy,
        maximum_before=grouped(W, grid.group_size).abs().amax(-1).mean(-1),
        maximum_after=grouped(target, grid.group_size).abs().amax(-1).mean(-1),
    )
    return SolvedRows(Q, grid, figures)


def compensate(input_groups: InputGroups, W: torch.Tensor) -> torch.Tensor:
    """Return the weights that bring a layer's outputs back towards those of the source model.

    With x_s = x + d the inputs in the source model, W* minimizes ‖W (x + γ d) − W* x̂‖² + λ‖W* − W‖² over the tokens,
    where x̂ are the inputs x as a server rounds them. It is found in two steps, the first for γ d and the second for
    what rounding takes from x, of which all is made up for:

        W' = W + γ W (Σ d x̂ᵀ) (H + λI)⁻¹        W* = W' + W' (Σ (x − x̂) x̂ᵀ) (H + λI)⁻¹

    Args:
        input_groups: The input groups, prepared from all rows.
        W: Original weights of some rows of each, float32 [B, R, C].

    Source: quantization error propagation, arXiv 2504.09629; asymmetric calibration, arXiv 2504.02692.
    """
    return _behind_rounding(input_groups, behind_errors(input_groups, W))


def behind_errors(input_groups: InputGroups, W: torch.Tensor) -> torch.Tensor:
    """Return the weights that make up for errors that were made before the layer; their outputs are wanted.

    Args:
        input_groups: The input groups, prepared from all rows.
        W: Original weights of some rows of each, float32 [B, R, C].
    """
    return _behind(input_groups, W, input_groups.drift, input_groups.share[:, None, None])


def _behind_rounding(input_groups: InputGroups, W: torch.Tensor) -> torch.Tensor:
    """Return W*, which makes up for what rounding takes from the layer's inputs."""
    rounding, share = input_groups.inputs.rounding, input_groups.recipe.solver.compensation
    drift = None if rounding is None or share == 0 else rounding.drift
    return _behind(input_groups, W, drift, 1.0 if share == "auto" else share)


def _behind(
    input_groups: InputGroups, W: torch.Tensor, drift: torch.Tensor | None, share: torch.Tensor | float
) -> torch.Tensor:
    if drift is None or input_groups.factor is None:
        return W
    with timed(input_groups.seconds, "compensate", W.device):
        return W + input_groups.factor.solve((W @ drift).mul_(share))


def reproducible_share(input_groups: InputGroups, W: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Return the share γ of the correction ΔW = W (Σ d xᵀ) (H + λI)⁻¹ that two halves of the text agree on.

    With ΔW₁ and ΔW₂ from the halves' drifts D ± Δ alone, products taken under H:

        γ = ⟨ΔW₁, ΔW₂⟩ / ½ (‖ΔW₁‖² + ‖ΔW₂‖²) = (‖ΔW_D‖² − ‖ΔW_Δ‖²) / (‖ΔW_D‖² + ‖ΔW_Δ‖²)

    Where the halves are uneven, Δ is scaled so that γ tends to what even ones would give.

    It is measured on sampled rows, and lies between 0 and 1.

    Args:
        input_groups: The input groups, factored.
        W: Weights of all members of each, float32 [B, R, C].
        spread: How far the halves' drifts lie apart, Δ, as `InputSums.spread_` returns it, float32 [B, C, C].

    Returns:
        The share of each input group, float32 [B].
    """
    assert input_groups.drift is not None
    assert input_groups.factor is not None
    rows, factor, H = sample_rows(W), input_groups.factor, input_groups.H
    with timed(input_groups.seconds, "compensate", W.device):
        common, apart = (
            layer_error(factor.solve(rows @ drift), torch.zeros_like(rows), H).sum(-1)
            for drift in (input_groups.drift, spread)
        )
    return ((common - apart) / (common + apart).clamp(min=_TINY)).clamp(0, 1)


def measure_width(input_groups: InputGroups, W: torch.Tensor, bits: int) -> list[float]:
    """Measure the relative layer error of each input group at some width, on sampled rows.

    Nothing is regularized: the best β of one width is not that of another.

    Args:
        input_groups: The input groups, prepared with any width.
        W: Weights of all members of each, float32 [B, R, C].
        bits: The width.
    """
    scheme = dataclasses.replace(input_groups.scheme, bits=bits)
    measured = dataclasses.replace(input_groups, scheme=scheme, problem=None, seconds={})
    with timed(input_groups.seconds, "widths", W.device):
        figures = solve_rows(measured, sample_rows(W)).figures
    errors: list[float] = (figures.error.sum(-1) / figures.energy.sum(-1).clamp(min=_TINY)).tolist()
    return errors


def num_sample_rows(num_rows: int) -> int:
    """Return how many rows of an input group β and widths are measured on."""
    return min(max(num_rows // 8, 1), _SAMPLED_ROWS)


def sample_rows(W: torch.Tensor) -> torch.Tensor:
    """Return the rows that β and widths are measured on, [B, S, C] of [B, R, C]."""
    num_rows = W.shape[-2]
    return W[..., torch.linspace(0, num_rows - 1, num_sample_rows(num_rows), device=W.device).round().long(), :]
