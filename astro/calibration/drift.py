"""How the inputs of a layer drifted from what they should be: the sum from which its weights learn to make up for it.

Shapes: T tokens, C columns (inputs of the layer).
"""

import torch

from astro.calibration.hessian import is_multiplied_exactly, product, shrunk_
from astro.calibration.product_sum import ProductSum
from astro.errors import NumericalError

__all__ = ["DriftAccumulator"]


class DriftAccumulator(ProductSum):
    """Sums w (x_s − x) x̂ᵀ over chunks: how the inputs x of a layer drifted from what they should be, x_s.

    The weights are multiplied with x̂, the inputs as a server rounds them, or x itself where inputs stay as they are.
    What rounding takes is such a drift too: Σ w (x − x̂) x̂ᵀ, or Σ w (x − x̂) xᵀ for what reads inputs as they are.
    Order and merging are those of `HessianAccumulator`.

    Attributes:
        total_weight: Sum of the weights of the tokens that were added, float64 [] on the device.
    """

    def __init__(self, num_columns: int, device: torch.device, keep_inputs: bool = False) -> None:
        """Begin with an empty sum.

        Args:
            num_columns: Number C of columns.
            device: Device of the sum.
            keep_inputs: Whether the factors of the sum are kept until they are larger than it would be, see
                `ProductSum`.
        """
        super().__init__(num_columns, device, keep_inputs)
        self.total_weight = torch.zeros((), dtype=torch.float64, device=device)

    def add_(
        self,
        X_source: torch.Tensor,
        X: torch.Tensor,
        weights: torch.Tensor | None = None,
        X_read: torch.Tensor | None = None,
    ) -> None:
        """Add the inputs of one chunk.

        Args:
            X_source: What the inputs of the layer should be, such as those in the source model [..., C].
            X: Inputs of the layer for the same tokens [..., C].
            weights: Weight of each token, float32 [T] and at least 0; every token has weight 1 where not given.
            X_read: What the weights are multiplied with, if that is not X [..., C]. Where it is kept, nothing may
                write to it any more.
        """
        D = X_source.reshape(-1, X.shape[-1]).float() - X.reshape(-1, X.shape[-1]).float()
        X = (X if X_read is None else X_read).reshape(-1, X.shape[-1])
        if weights is None:
            self.total_weight += len(X)
        else:
            self.total_weight += weights.sum(dtype=torch.float64)
            D *= weights.unsqueeze(-1)
        self._keep(D, X)

    def absorb_(self, other: "DriftAccumulator") -> None:
        """Add all that another accumulator has seen, which stays as it is.

        Args:
            other: The other accumulator; factors that it keeps are shared, not copied.
        """
        self._absorb_sum_(other)
        self.total_weight += other.total_weight

    def _add_product_(self, total: torch.Tensor, *factors: torch.Tensor) -> None:
        D, X = factors
        if is_multiplied_exactly(X) and X.dtype == torch.bfloat16:
            # It has the range of float32, and two of them hold a number to 2⁻¹⁷.
            high = D.to(X.dtype)
            total += product(high, X)
            rest = D - high if self._room else D.sub_(high)  # what is kept may be shared
            total += product(rest.to(X.dtype), X)
        else:
            total += product(D, X.float())

    def merge_(self, partial: torch.Tensor, total_weight: float) -> None:
        """Add a sum that was computed elsewhere.

        Args:
            partial: The `partial` of another accumulator, [C, C] on the device of this one.
            total_weight: Sum of the weights of the tokens in that sum.
        """
        self.partial.add_(partial)
        self.total_weight += total_weight

    def spread_(self, half: "DriftAccumulator") -> torch.Tensor:
        """Return how far the drifts over some tokens and over the others lie apart, Δ, float32 [C, C].

        With D₁ and D₂ the means over tokens whose weights add up to a and b:

            Δ = √(a b) / (a + b) · (D₁ − D₂)

        Where chance makes drifts differ, the mean of ‖Δ‖² is the mean of what chance adds to the ‖D‖² of the whole
        drift D = (a D₁ + b D₂) / (a + b), however uneven the two parts are. Halves have Δ = (D₁ − D₂) / 2.

        Args:
            half: The sum over some of the tokens, whose memory is taken for the result.
        """
        tiny = torch.finfo(torch.float64).tiny
        rest, rest_weight = self.partial - half.partial, (self.total_weight - half.total_weight).clamp(min=0)
        share = (half.total_weight * rest_weight).sqrt() / self.total_weight.clamp(min=tiny)
        mean = half.partial.div_(half.total_weight.clamp(min=tiny))
        return mean.sub_(rest.div_(rest_weight.clamp(min=tiny))).mul_(share)

    def finish_(self, name: str, factors: torch.Tensor) -> torch.Tensor:
        """Return the weighted mean over all tokens, shrunk, [C, C] float32. The accumulator is empty afterwards.

        Args:
            name: Name of the layer, for messages.
            factors: Factors [C] by which all but the diagonal is shrunk, see `hessian.shrinkage`.

        Raises:
            NumericalError: An input was not finite.
        """
        drift = self._take_()
        if not bool(torch.isfinite(drift).all()):
            raise NumericalError(
                f"{name}: its inputs in the source model hold NaN or Inf; check the model in this compute dtype "
                "(execution.compute_dtype)"
            )
        drift.div_(torch.where(self.total_weight > 0, self.total_weight, 1.0))
        return shrunk_(drift, factors)
