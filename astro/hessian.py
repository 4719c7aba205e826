"""The Hessian of a layer's squared error: accumulation, damping, factorization.

For Y = X Wᵀ the layer error of a perturbed weight is tr(ΔW H ΔWᵀ) with H = XᵀX.
Shapes: T tokens, C columns (inputs of the layer).
"""

import dataclasses

import torch

from astro.errors import NumericalError

__all__ = ["DriftAccumulator", "Factor", "HessianAccumulator", "factorize", "layer_error"]

_TILE = 1024
"""Rows of H in one product. Part of the arithmetic: another tile rounds differently."""


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
            X: inputs of the layer [..., C], any float dtype; products are formed in float32. Where inputs are kept it
                must not be written to any more.
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
        for start in range(0, H.shape[0], _TILE):
            stop = start + _TILE
            H[stop:, start:stop] = H[start:stop, stop:].T
        return H.div_(self.num_tokens)

    def _fold(self) -> None:
        kept, self._kept = self._kept, []
        if kept and self._sum is None:
            self._sum = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
        for X in (X.float() for X in kept):
            for start in range(0, X.shape[1], _TILE):
                rows = slice(start, start + _TILE)
                self._sum[rows, start:] += X[:, rows].T @ X[:, start:]  # type: ignore[index]


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
        X = X.reshape(-1, X.shape[-1]).float()
        self.partial += (X_source.reshape(X.shape).float() - X).T @ X
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


@dataclasses.dataclass(frozen=True)
class Factor:
    """Triangular factor of a damped, reordered Hessian.

    Attributes:
        feedback: unit upper triangular N [C, C] float32 with H[order][:, order] + λI = (N D)(N D)ᵀ, D diagonal.
        order: int64 [C], the column that is visited first, second, ...
        cost: D², float32 [C] in the original column order: what a unit error of a column costs once the columns
            visited after it have made up for it as well as they can. GPTQ's squared error is Σ_i D_i² e_i².
        damping: the share of the mean diagonal that was added.
        attempts: factorizations that were tried; 1 where nothing had to be raised.
    """

    feedback: torch.Tensor
    order: torch.Tensor
    cost: torch.Tensor
    damping: float
    attempts: int

    def solve(self, B: torch.Tensor) -> torch.Tensor:
        """B (H + λI)⁻¹ for B [R, C], float32 [R, C]."""
        V = self.feedback * self.cost[self.order].sqrt()
        # B P (V Vᵀ)⁻¹ with the columns in the order of the factor
        half = torch.linalg.solve_triangular(V.T, B[:, self.order], upper=False, left=False)
        out = torch.empty_like(B)
        out[:, self.order] = torch.linalg.solve_triangular(V, half, upper=True, left=False)
        return out


def factorize(H: torch.Tensor, order: torch.Tensor, damping: float, max_damping: float, name: str) -> Factor:
    """Factor H + λI with λ = damping · mean(diag H), columns taken in `order`.

    Where the Cholesky factorization fails the damping is multiplied by 10 and tried again, up to `max_damping`.

    Args:
        H: symmetric float32 [C, C].
        order: permutation, int64 [C].
        damping: share of the mean diagonal to begin with.
        max_damping: largest share that is acceptable.
        name: of the layer, for messages.

    Raises:
        NumericalError: H is zero, or not positive definite even with `max_damping`.

    Source: damping from GPTQ, arXiv 2210.17323. An upper factor comes from a lower one of the reversed matrix.
    """
    mean = H.diagonal().mean()
    if not bool(mean > 0):
        raise NumericalError(f"{name}: every calibration input of this layer is zero")
    reverse = order.flip(0)
    attempts = 0
    while True:
        attempts += 1
        P = H[reverse[:, None], reverse]
        P.diagonal().add_(damping * mean)
        L, info = torch.linalg.cholesky_ex(P)
        del P
        if not int(info):
            V = L.flip(0, 1)
            del L  # a wide layer's matrices are gigabytes: never hold one more than needed
            D = V.diagonal().clone()
            cost = torch.empty_like(D)
            cost[order] = D.square()
            return Factor(V.div_(D), order, cost, damping, attempts)
        if damping * 10 > max_damping * (1 + 1e-6):
            raise NumericalError(
                f"{name}: the Hessian is not positive definite with damping {damping:g} "
                f"(the limit is {max_damping:g}); use more calibration tokens or raise quantization.max_damping"
            )
        damping *= 10


def layer_error(W: torch.Tensor, W_hat: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Squared output error of each row: diag((W − Ŵ) H (W − Ŵ)ᵀ), float32 [R]."""
    E = W - W_hat
    return ((E @ H) * E).sum(1)
