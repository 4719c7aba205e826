"""The Hessian of a layer's squared error: accumulation, damping, factorization.

For Y = X Wᵀ the layer error of a perturbed weight is tr(ΔW H ΔWᵀ) with H = XᵀX.
Shapes: T tokens, C columns (inputs of the layer), B layers side by side.
"""

import torch

from astro.errors import NumericalError
from astro.linalg.symmetric import mirror_, strips

__all__ = ["DriftAccumulator", "HessianAccumulator"]


class HessianAccumulator:
    """Sums XᵀX over chunks, in the order in which they are added, in float32.

    Each chunk's product is formed on its own and then added. Sums over shares of the chunks that are merged in a fixed
    order give the same bits wherever they were computed. Only the tiles on and above the diagonal are computed.
    """

    def __init__(self, num_columns: int, device: torch.device, keep_inputs: bool = False) -> None:
        """Begin with nothing.

        Args:
            num_columns: C.
            device: where the sum is.
            keep_inputs: keep inputs as they are until they are larger than the sum would be. Comes to the same bits;
                for the many layers that each see few tokens, as experts do.
        """
        self._shape, self._device = (num_columns, num_columns), device
        self._sum: torch.Tensor | None = None
        self._kept: list[torch.Tensor] = []
        self._room = 4 * num_columns**2 if keep_inputs else 0
        self.num_tokens = 0

    def add_(self, X: torch.Tensor) -> None:
        """Add one chunk.

        Args:
            X: inputs of the layer [..., C], any float dtype; products are formed and added in float32. Where inputs are
                kept it must not be written to any more.
        """
        X = X.reshape(-1, X.shape[-1])
        self.num_tokens += X.shape[0]
        self._kept.append(X)
        if sum(kept.nbytes for kept in self._kept) > self._room:
            self._fold()

    @property
    def partial(self) -> torch.Tensor:
        """The sum so far, float32 [C, C]; only its tiles on and above the diagonal are filled."""
        self._fold()
        if self._sum is None:
            self._sum = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
        return self._sum

    def merge_(self, partial: torch.Tensor, num_tokens: int) -> None:
        """Add a sum that was begun elsewhere.

        Args:
            partial: of another accumulator, on this one's device.
            num_tokens: tokens in it.
        """
        self.partial.add_(partial)
        self.num_tokens += num_tokens

    def absorb_(self, other: "HessianAccumulator") -> None:
        """Add all that another has seen; that one stays as it is, its inputs kept where they are."""
        if other._sum is not None:
            self.partial.add_(other._sum)
        self.num_tokens += other.num_tokens - sum(len(X) for X in other._kept)
        for X in other._kept:
            self.add_(X)

    def finish_(self, name: str) -> torch.Tensor:
        """The mean of xxᵀ over all tokens, symmetric [C, C] float32. The accumulator is empty afterwards.

        Raises:
            NumericalError: no token was seen, or an input was not finite.
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
        return H.div_(self.num_tokens)

    def _fold(self) -> None:
        kept, self._kept = self._kept, []
        if kept and self._sum is None:
            self._sum = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
        for X in (X if _is_multiplied_exactly(X) else X.float() for X in kept):
            for rows in strips(self._sum):  # type: ignore[arg-type]
                self._sum[rows, rows.start :] += _product(X[:, rows], X[:, rows.start :])  # type: ignore[index]


def _is_multiplied_exactly(X: torch.Tensor) -> bool:
    """Whether its device takes 16-bit numbers for sums in float32, in which each of their products is exact."""
    return X.device.type == "cuda" and X.dtype in (torch.bfloat16, torch.float16)


def _product(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """XᵀY in float32."""
    return X.T @ Y if X.dtype == torch.float32 else torch.mm(X.T, Y, out_dtype=torch.float32)


class DriftAccumulator:
    """Sums (X_s − X)ᵀ X over chunks: how the inputs X of a layer drifted from those of the source model, X_s.

    Order and merging are those of `HessianAccumulator`.
    """

    def __init__(self, num_columns: int, device: torch.device) -> None:
        self.partial = torch.zeros(num_columns, num_columns, dtype=torch.float32, device=device)
        self.num_tokens = 0

    def add_(self, X_source: torch.Tensor, X: torch.Tensor) -> None:
        """Add one chunk.

        Args:
            X_source: inputs of the layer in the source model [..., C].
            X: inputs of the layer behind quantized layers, for the same tokens [..., C].
        """
        X = X.reshape(-1, X.shape[-1])
        D = X_source.reshape(X.shape).float() - X.float()
        if _is_multiplied_exactly(X) and X.dtype == torch.bfloat16:  # of a float32's range; two hold it to 2⁻¹⁷
            high = D.to(X.dtype)
            self.partial += _product(high, X)
            self.partial += _product(D.sub_(high).to(X.dtype), X)
        else:
            self.partial += _product(D, X.float())
        self.num_tokens += X.shape[0]

    def merge_(self, partial: torch.Tensor, num_tokens: int) -> None:
        """Add a sum that was begun elsewhere, [C, C] on this one's device."""
        self.partial += partial
        self.num_tokens += num_tokens

    def finish_(self, name: str) -> torch.Tensor:
        """The mean over all tokens, [C, C] float32. The accumulator is empty afterwards.

        Raises:
            NumericalError: an input was not finite.
        """
        drift, self.partial = self.partial, torch.empty(0)
        if not bool(torch.isfinite(drift).all()):
            raise NumericalError(
                f"{name}: its inputs in the source model hold NaN or Inf; check the model in this compute dtype "
                "(execution.compute_dtype)"
            )
        return drift.div_(max(self.num_tokens, 1))
