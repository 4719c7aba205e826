"""The Hessian of a layer's squared error: accumulation and shrinkage.

For Y = X Wᵀ the layer error of a perturbed weight is tr(ΔW H ΔWᵀ) with H = XᵀX, or, where tokens have weights w_t,
H = Σ_t w_t x_t x_tᵀ; see `token_weights`. Shapes: T tokens, C columns (inputs of the layer).
"""

from collections.abc import Sequence

import torch

from astro.errors import NumericalError
from astro.linalg.symmetric import mirror_, strips

__all__ = ["DriftAccumulator", "HessianAccumulator", "summed_dtype"]


class HessianAccumulator:
    """Sums w_t x_t x_tᵀ over chunks of calibration tokens, in the order in which they are added, in float32.

    The product of each chunk is formed first and then added. So sums over shares of the chunks give the same bits
    wherever they were computed, if they are merged in a fixed order. Only tiles on and above the diagonal are computed.

    Attributes:
        num_tokens: Number of tokens that were added.
        totals: Sums over these tokens of the weight w, of the energy w ‖x‖², and of its square, float64 [3] on the
            device.
    """

    def __init__(self, num_columns: int, device: torch.device, keep_inputs: bool = False) -> None:
        """Begin with an empty sum.

        Args:
            num_columns: Number C of columns.
            device: Device of the sum.
            keep_inputs: Whether inputs are kept as they are until they are larger than the sum would be. The bits are
                the same; it saves memory for many layers that each see few tokens, as experts do.
        """
        self._shape, self._device = (num_columns, num_columns), device
        self._sum: torch.Tensor | None = None
        self._kept: list[torch.Tensor] = []
        self._room = 4 * num_columns**2 if keep_inputs else 0
        self.num_tokens = 0
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)

    def add_(self, X: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add the inputs of one chunk.

        Args:
            X: Inputs of the layer [..., C] in any float dtype; products are formed and added in float32. Where inputs
                are kept, nothing may write to them any more.
            weights: Weight of each token, float32 [T] and at least 0; every token has weight 1 where not given.
        """
        X = X.reshape(-1, X.shape[-1])
        self.num_tokens += len(X)
        energies = torch.linalg.vector_norm(X, dim=-1, dtype=torch.float32).double().square_()
        if weights is None:
            weights = torch.ones_like(energies)
        else:
            energies *= weights
            X = _scaled(X, weights.sqrt())
        self.totals += torch.stack([weights.sum(dtype=torch.float64), energies.sum(), energies.square().sum()])
        self._keep(X)

    def effective_tokens(self) -> torch.Tensor:
        """Return how many tokens of equal energy would say as much as those that were added, float64 [].

        With e_t = w_t ‖x_t‖² it is (Σ e)² / Σ e²: the number of tokens where their energies are equal, and less where
        a few of them make up most of the sum. It is 0 where all inputs are 0.
        """
        _, energy, square = self.totals
        return torch.where(square > 0, energy.square() / square, 0.0)

    def _keep(self, X: torch.Tensor) -> None:
        self._kept.append(X)
        if sum(kept.nbytes for kept in self._kept) > self._room:
            self._fold()

    @property
    def partial(self) -> torch.Tensor:
        """Sum so far, float32 [C, C]; only its tiles on and above the diagonal are filled."""
        self._fold()
        if self._sum is None:
            self._sum = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
        return self._sum

    def merge_(self, partial: torch.Tensor, num_tokens: int, totals: Sequence[float]) -> None:
        """Add a sum that was computed elsewhere.

        Args:
            partial: The `partial` of another accumulator, on the device of this one.
            num_tokens: Number of tokens in that sum.
            totals: The `totals` of that accumulator.
        """
        self.partial.add_(partial)
        self.num_tokens += num_tokens
        self.totals += torch.tensor(totals, dtype=torch.float64, device=self._device)

    def absorb_(self, other: "HessianAccumulator") -> None:
        """Add all that another accumulator has seen, which stays as it is.

        Args:
            other: The other accumulator; inputs that it keeps are shared, not copied.
        """
        if other._sum is not None:
            self.partial.add_(other._sum)
        self.num_tokens += other.num_tokens
        self.totals += other.totals
        for X in other._kept:
            self._keep(X)

    def finish_(self, name: str) -> torch.Tensor:
        """Return the weighted mean of xxᵀ over all tokens, shrunk, symmetric [C, C] float32. The sum is then empty.

        GPTQ makes up for an error in one column by what H says of others, and where tokens are few beside columns,
        chance says much of it. So, as if C more tokens with the same diagonal and independent columns had been added
        to T effective ones,

            H_ij ← H_ij · T / (T + C)   for i ≠ j

        With 128 × 2048 tokens and 8192 columns this is 3 %. It is shrinkage towards the diagonal (Schäfer and
        Strimmer, 2005), with its strength from T and C alone.

        Args:
            name: Name of the layer, for messages.

        Raises:
            NumericalError: No token was seen, or an input was not finite.
        """
        H, self._sum = self.partial, None
        if not self.num_tokens:
            raise NumericalError(f"{name}: no calibration token reached this layer; use more calibration text")
        if not bool(torch.isfinite(H.diagonal()).all()):
            raise NumericalError(
                f"{name}: its calibration inputs hold NaN or Inf, or overflow float32 when squared; "
                "check the model in this compute dtype (execution.compute_dtype)"
            )
        mirror_(H)
        # Where all inputs are 0 their weights may be 0 too, and so is the sum.
        H.div_(torch.where(self.totals[0] > 0, self.totals[0], 1.0))
        diagonal, tokens = H.diagonal().clone(), self.effective_tokens()
        H.mul_(tokens / (tokens + len(H))).diagonal().copy_(diagonal)
        return H

    def _fold(self) -> None:
        kept, self._kept = self._kept, []
        if kept and self._sum is None:
            self._sum = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
        for X in (X if _is_multiplied_exactly(X) else X.float() for X in kept):
            for rows in strips(self._sum):  # type: ignore[arg-type]
                self._sum[rows, rows.start :] += _product(X[:, rows], X[:, rows.start :])  # type: ignore[index]


def _scaled(X: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return inputs times a factor for each token: in bfloat16 where the device multiplies that as it is.

    Rounding x to x + δ makes the sum that of other inputs, which is symmetric and positive all the same.
    """
    scaled = X.to(torch.float32, copy=True).mul_(factors.unsqueeze(-1))
    return scaled.to(summed_dtype(X.dtype, X.device.type, is_weighted=True))


def summed_dtype(dtype: torch.dtype, device_type: str, is_weighted: bool) -> torch.dtype:
    """Return the dtype in which inputs are kept until their products are summed.

    Args:
        dtype: Dtype of the inputs.
        device_type: Type of the device, "cpu" or "cuda".
        is_weighted: Whether tokens have weights. A root of a weight times a float16 number may overflow float16.
    """
    if not is_weighted or (device_type == "cuda" and dtype == torch.bfloat16):
        return dtype
    return torch.float32


def _is_multiplied_exactly(X: torch.Tensor) -> bool:
    """Tell whether the device multiplies 16-bit numbers as they are, and adds their exact products in float32."""
    return X.device.type == "cuda" and X.dtype in (torch.bfloat16, torch.float16)


def _product(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """Return XᵀY in float32."""
    return X.T @ Y if X.dtype == torch.float32 else torch.mm(X.T, Y, out_dtype=torch.float32)


class DriftAccumulator:
    """Sums w (x_s − x) xᵀ over chunks: how the inputs x of a layer drifted from those of the source model, x_s.

    Order and merging are those of `HessianAccumulator`.

    Attributes:
        partial: Sum so far, float32 [C, C].
        total_weight: Sum of the weights of the tokens that were added, float64 [] on the device.
    """

    def __init__(self, num_columns: int, device: torch.device) -> None:
        """Begin with a sum of zeros.

        Args:
            num_columns: Number C of columns.
            device: Device of the sum.
        """
        self.partial = torch.zeros(num_columns, num_columns, dtype=torch.float32, device=device)
        self.total_weight = torch.zeros((), dtype=torch.float64, device=device)

    def add_(self, X_source: torch.Tensor, X: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add the inputs of one chunk.

        Args:
            X_source: Inputs of the layer in the source model [..., C].
            X: Inputs of the layer behind quantized layers, for the same tokens [..., C].
            weights: Weight of each token, float32 [T] and at least 0; every token has weight 1 where not given.
        """
        X = X.reshape(-1, X.shape[-1])
        D = X_source.reshape(X.shape).float() - X.float()
        if weights is None:
            self.total_weight += len(X)
        else:
            self.total_weight += weights.sum(dtype=torch.float64)
            D *= weights.unsqueeze(-1)
        if (
            _is_multiplied_exactly(X) and X.dtype == torch.bfloat16
        ):  # it has the range of float32, and two of them hold a number to 2⁻¹⁷
            high = D.to(X.dtype)
            self.partial += _product(high, X)
            self.partial += _product(D.sub_(high).to(X.dtype), X)
        else:
            self.partial += _product(D, X.float())

    def merge_(self, partial: torch.Tensor, total_weight: float) -> None:
        """Add a sum that was computed elsewhere.

        Args:
            partial: The `partial` of another accumulator, [C, C] on the device of this one.
            total_weight: Sum of the weights of the tokens in that sum.
        """
        self.partial += partial
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

    def finish_(self, name: str) -> torch.Tensor:
        """Return the weighted mean over all tokens, [C, C] float32. The accumulator is empty afterwards.

        Args:
            name: Name of the layer, for messages.

        Raises:
            NumericalError: An input was not finite.
        """
        drift, self.partial = self.partial, torch.empty(0)
        if not bool(torch.isfinite(drift).all()):
            raise NumericalError(
                f"{name}: its inputs in the source model hold NaN or Inf; check the model in this compute dtype "
                "(execution.compute_dtype)"
            )
        return drift.div_(torch.where(self.total_weight > 0, self.total_weight, 1.0))
