"""What the rows of linear layers with a common input share.

Layers that read one input are an input group. Prepared once for it are the factor of the Hessian, the operator of the
regularizer, and the strength β, which `beta_search` chooses where it is to be searched. Input groups of one shape, like
those of a layer's experts, lie side by side, each with its Hessian and its β.
Shapes: B input groups side by side, mostly 1; R rows of all members of an input group together, C columns.
"""

import dataclasses
from collections.abc import Sequence

import torch

from astro.config import LayerScheme
from astro.linalg.cholesky import Factor, factorize
from astro.quantization import gptq, regularizer
from astro.quantization.recipe import InputGroupOutcome, InputMoments, Recipe
from astro.quantization.regularizer import Problem, mean_group_maximum
from astro.timing import timed

__all__ = ["InputGroups", "factor_input_groups", "prepare_input_groups", "with_regularizer"]


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
