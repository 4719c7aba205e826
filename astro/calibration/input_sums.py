"""Everything that is summed over the calibration tokens of one input group.

Where servers round inputs, x̂ is what a token's inputs x become. Then the Hessian is that of x̂, because x̂ is what the
quantized weights are multiplied with, and two things are learned of rounding: the drift Σ w (x − x̂) x̂ᵀ, from which the
weights learn what of it they can make up for, and a sample of tokens, x̂ and x − x̂, on which the error of the outputs is
measured. A correction of low rank reads x itself; for it there is the drift Σ w (x − x̂) xᵀ besides.
Shapes: T tokens, C columns, N sampled tokens.
"""

import dataclasses
from collections.abc import Sequence

import torch

from astro.calibration.drift import DriftAccumulator
from astro.calibration.hessian import HessianAccumulator, shrinkage, shrunk_
from astro.calibration.rounded_sample import RoundedSample
from astro.calibration.token_weights import Kind
from astro.linalg.batching import stacked_padded
from astro.model.activation_rounding import InputGrid, round_activations
from astro.model.operands import Operand

__all__ = ["InputSums", "RoundingMoments", "SumKind", "as_they_are", "side_by_side"]


@dataclasses.dataclass(frozen=True)
class SumKind:
    """What is summed of an input group.

    Attributes:
        grid: Grid to which servers round the inputs; None where they stay as they are.
        has_drift: Whether the drift from the source model's inputs is summed.
        has_rounding_drift: Whether the drift from rounding is summed, where inputs are rounded.
        has_correction_drift: Whether it is summed for corrections of low rank as well, where inputs are rounded. These
            need the drift from rounding too, which is then summed in any case.
    """

    grid: InputGrid | None = None
    has_drift: bool = False
    has_rounding_drift: bool = False
    has_correction_drift: bool = False


def as_they_are(_: Operand) -> SumKind:
    """Return the sums of inputs that nothing is done to, which every operand has in the source model."""
    return SumKind()


@dataclasses.dataclass(frozen=True)
class RoundingMoments:
    """What was learned of how inputs are rounded, of one input group or of several side by side.

    Attributes:
        sample: Tokens before and after rounding, see `RoundedSample`, scaled so that sums of squares over them are
            means over all tokens, of which each counts v, float32 [..., N, 2C].
        drift: Weighted mean of (x − x̂)x̂ᵀ, float32 [..., C, C]; None where nothing makes up for it.
        correction_drift: Weighted mean of (x − x̂)xᵀ, float32 [..., C, C]; None where no correction of low rank makes
            up for it.
    """

    sample: torch.Tensor
    drift: torch.Tensor | None
    correction_drift: torch.Tensor | None = None

    def to(self, device: torch.device) -> "RoundingMoments":
        """Return the same on a device.

        Args:
            device: The device.
        """
        drifts = (None if drift is None else drift.to(device) for drift in (self.drift, self.correction_drift))
        return RoundingMoments(self.sample.to(device), *drifts)


def side_by_side(moments: Sequence[RoundingMoments | None], num_columns: int) -> RoundingMoments | None:
    """Put the moments of input groups of one shape side by side.

    Args:
        moments: Those of each input group; None for one of which nothing is known.
        num_columns: Number C of columns.

    Returns:
        Moments with B input groups; None where no input is rounded.
    """
    sample = stacked_padded([each.sample if each else None for each in moments], 2 * num_columns)
    if sample is None:
        return None
    drift, correction_drift = (
        stacked_padded([getattr(each, name) if each else None for each in moments], num_columns)
        for name in ("drift", "correction_drift")
    )
    return RoundingMoments(sample, drift, correction_drift)


class InputSums:
    """The sums over the calibration tokens of one input group.

    Attributes:
        kind: What is summed.
        token_weights: What the tokens are weighted by.
        hessian: Sum of w x̂x̂ᵀ; x̂ is x where inputs stay as they are.
        drift: Sum of w (x_s − x)x̂ᵀ, x_s being the inputs in the source model; None where it is not wanted.
        rounding_drift: Sum of w (x − x̂)x̂ᵀ; None where it is not wanted.
        correction_drift: Sum of w (x − x̂)xᵀ; None where it is not wanted.
        sample: Sample of tokens before and after rounding; None where inputs stay as they are.
    """

    def __init__(
        self,
        num_columns: int,
        device: torch.device,
        kind: SumKind,
        token_weights: Kind,
        keep_inputs: bool = False,
    ) -> None:
        """Begin with empty sums.

        Args:
            num_columns: Number C of columns.
            device: Device of the sums.
            kind: What is summed.
            token_weights: What the tokens are weighted by.
            keep_inputs: Whether inputs are kept while they are smaller than the sums, see `HessianAccumulator`.
        """

        def drift() -> DriftAccumulator:
            return DriftAccumulator(num_columns, device, keep_inputs)

        is_rounded = kind.grid is not None
        self.kind, self.token_weights = kind, token_weights
        self.hessian = HessianAccumulator(num_columns, device, keep_inputs)
        self.drift = drift() if kind.has_drift else None
        self.rounding_drift = drift() if (kind.has_rounding_drift or kind.has_correction_drift) and is_rounded else None
        self.correction_drift = drift() if kind.has_correction_drift and is_rounded else None
        self.sample = RoundedSample(num_columns, device) if is_rounded else None

    @property
    def _is_by_loss(self) -> bool:
        return self.token_weights == "loss"

    @property
    def num_tokens(self) -> int:
        """Number of tokens that were added."""
        return self.hessian.num_tokens

    def add_(self, X: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Add the inputs of one chunk to all but the drift from the source.

        Args:
            X: Inputs of the layer [..., C] in any float dtype, not rounded. Nothing may write to them any more where
                inputs are kept.
            weights: Weight of each token, float32 [T] and at least 0; None where tokens are weighted by nothing.

        Returns:
            The inputs as servers round them.
        """
        assert (weights is None) == (self.token_weights == "none")
        if self.kind.grid is None:
            self.hessian.add_(X, weights)
            return X
        rounded = round_activations(X, self.kind.grid)
        self.hessian.add_(rounded, weights)
        assert self.sample is not None
        self.sample.add_(X, rounded, weights.square() if self._is_by_loss and weights is not None else weights)
        if self.rounding_drift is not None:
            self.rounding_drift.add_(X, rounded, weights)
        if self.correction_drift is not None:
            self.correction_drift.add_(X, rounded, weights, X)
        return rounded

    def finish_(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None, RoundingMoments | None]:
        """Return H, the drift from the source, and what was learned of rounding, as means. The sums are then empty.

        Drifts are shrunk as the Hessian is: what chance says of two columns counts as little in the one as in the
        others. Were a drift d = A x̂ left as it is, the weights W A that make up for it would come out too large by what
        the Hessian lost.

        Args:
            name: Name of the layers, for messages.

        Raises:
            NumericalError: No token was seen, or an input was not finite.
        """
        tokens = self.hessian.effective_tokens()
        H = self.hessian.finish_(name)
        factors = shrinkage(H.diagonal(), tokens)
        drift = None if self.drift is None else self.drift.finish_(name, factors)
        if self.sample is None:
            return H, drift, None
        drifts = (
            None if of_rounding is None else of_rounding.finish_(name, factors)
            for of_rounding in (self.rounding_drift, self.correction_drift)
        )
        weight = self.hessian.totals[0]
        # With v = w² the mean of v ‖δ‖² is taken relative to (mean of w)², as weights by the loss have the mean 1.
        divisor = weight.square() / self.hessian.num_tokens if self._is_by_loss else weight
        sample = self.sample.rows / torch.where(divisor > 0, divisor, 1.0).sqrt().float()
        return H, drift, RoundingMoments(sample, *drifts)

    def spread_(self, half: DriftAccumulator) -> torch.Tensor:
        """Return how far the drifts from the source over some tokens and over the others lie apart, float32 [C, C].

        It is shrunk as the drift is, see `finish_`; for what it is, see `DriftAccumulator.spread_`.

        Args:
            half: The sum of the drift over some of the tokens, whose memory is taken for the result.
        """
        assert self.drift is not None
        energies = self.hessian.partial.diagonal()
        return shrunk_(self.drift.spread_(half), shrinkage(energies, self.hessian.effective_tokens()))

    def absorb_(self, other: "InputSums") -> None:
        """Add all that other sums have seen but for the drift from the source; they stay as they are.

        Args:
            other: The other sums, of the same kind and with tokens weighted by the same.
        """
        assert self.token_weights == other.token_weights
        self.hessian.absorb_(other.hessian)
        if self.rounding_drift is not None and other.rounding_drift is not None:
            self.rounding_drift.absorb_(other.rounding_drift)
        if self.correction_drift is not None and other.correction_drift is not None:
            self.correction_drift.absorb_(other.correction_drift)
        if self.sample is not None and other.sample is not None:
            self.sample.merge_(other.sample.rows)
