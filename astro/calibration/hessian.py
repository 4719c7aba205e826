"""The Hessian of a layer's squared error: accumulation and shrinkage.

For Y = X Wᵀ the layer error of a perturbed weight is tr(ΔW H ΔWᵀ) with H = XᵀX, or, where tokens have weights w_t,
H = Σ_t w_t x_t x_tᵀ; see `token_weights`. Shapes: T tokens, C columns (inputs of the layer).
"""

from collections.abc import Sequence

import torch

from astro.calibration.product_sum import ProductSum
from astro.errors import NumericalError
from astro.linalg.symmetric import mirror_, strips

__all__ = ["HessianAccumulator", "is_multiplied_exactly", "product", "shrinkage", "shrunk_", "summed_dtype"]


class HessianAccumulator(ProductSum):
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
            keep_inputs: Whether inputs are kept until they are larger than the sum would be, see `ProductSum`.
        """
        super().__init__(num_columns, device, keep_inputs)
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
        self._absorb_sum_(other)
        self.num_tokens += other.num_tokens
        self.totals += other.totals

    def finish_(self, name: str) -> torch.Tensor:
        """Return the weighted mean of xxᵀ over all tokens, shrunk, symmetric [C, C] float32. The sum is then empty.

        GPTQ makes up for an error in one column by what H says of others, and where tokens are few beside columns,
        chance says much of it; see `shrinkage`.

        Args:
            name: Name of the layer, for messages.

        Raises:
            NumericalError: No token was seen, or an input was not finite.
        """
        H = self._take_()
        if not self.num_tokens:
            raise NumericalError(f"{name}: no calibration token reached this layer; use more calibration text")
        if not bool(torch.isfinite(H.diagonal()).all()):
            raise NumericalError(
                f"{name}: its calibration inputs hold NaN or Inf, or overflow float32 when squared; "
                "check the model in this compute dtype (execution.compute_dtype)"
            )
        # Where all inputs are 0 their weights may be 0 too, and so is the sum.
        H.div_(torch.where(self.totals[0] > 0, self.totals[0], 1.0))
        shrunk_(H, shrinkage(H.diagonal(), self.effective_tokens()))
        mirror_(H)
        return H

    def _add_product_(self, total: torch.Tensor, *factors: torch.Tensor) -> None:
        (X,) = factors
        X = X if is_multiplied_exactly(X) else X.float()
        for rows in strips(total):
            total[rows, rows.start :] += product(X[:, rows], X[:, rows.start :])


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


def is_multiplied_exactly(X: torch.Tensor) -> bool:
    """Tell whether the device multiplies 16-bit numbers as they are, and adds their exact products in float32.

    Args:
        X: Inputs of a layer.
    """
    return X.device.type == "cuda" and X.dtype in (torch.bfloat16, torch.float16)


def product(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """Return XᵀY in float32.

    Args:
        X: Left side [T, R], of a dtype that the device multiplies exactly.
        Y: Right side [T, C] in the same dtype.
    """
    return X.T @ Y if X.dtype == torch.float32 else torch.mm(X.T, Y, out_dtype=torch.float32)


def shrinkage(energies: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the factor of each column by which what H says of it and another is shrunk, float32 [C].

    As if C more tokens with independent columns had been added to T effective ones,

        H_ij ← H_ij / √((1 + ρ_i)(1 + ρ_j))   for i ≠ j, with ρ_i = C/T · min(1, h̄ / H_ii)

    where h̄ is the mean of H's diagonal. A column of mean energy or less keeps T / (T + C) of what it says of others of
    its kind: with 128 × 2048 tokens and 8192 columns 97 %. An outlier channel, whose energy is 100 times the mean,
    keeps nearly all. Its couplings stand out from chance, and it is its errors that the others must make up for.
    Shrinkage towards the diagonal is known (Schäfer and Strimmer, 2005); its strength here comes from T, C and the
    diagonal alone.

    Args:
        energies: Diagonal of H [C].
        tokens: Number T of effective tokens, float64 [].
    """
    limited = torch.where(energies > 0, energies.mean() / energies, 1.0).clamp_(max=1)
    return (tokens / (tokens + len(energies) * limited)).sqrt_().float()


def shrunk_(M: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Shrink a matrix towards its diagonal, which is left as it is.

    Args:
        M: A mean over tokens [C, C], which is overwritten.
        factors: Factor of each row and of each column [C], see `shrinkage`.
    """
    diagonal = M.diagonal().clone()
    for rows in strips(M):
        M[rows].mul_(torch.outer(factors[rows], factors))  # what is symmetric stays so to the last bit
    M.diagonal().copy_(diagonal)
    return M
