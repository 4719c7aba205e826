"""The Hessian of a layer's squared error: accumulation, damping, factorization.

For Y = X Wᵀ the layer error of a perturbed weight is tr(ΔW H ΔWᵀ) with H = XᵀX.
Shapes: T tokens, C columns (inputs of the layer), B layers side by side.
"""

import dataclasses
from collections.abc import Sequence

import torch

from astro.batch import add_product_, first_of
from astro.errors import NumericalError
from astro.triangle import mirror_, strips

__all__ = [
    "DriftAccumulator",
    "Factor",
    "HessianAccumulator",
    "factorize",
    "layer_error",
    "require_inputs",
    "squared_error",
]


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


@dataclasses.dataclass(frozen=True)
class Factor:
    """Triangular factors of damped, reordered Hessians, one for each of B layers; of a single one without [B].

    Attributes:
        feedback: unit upper triangular N [B, C, C] float32 with H[order][:, order] + λI = (N D)(N D)ᵀ, D diagonal.
        order: int64 [B, C], the column that is visited first, second, ...
        cost: D², float32 [B, C] in the original column order: what a unit error of a column costs once the columns
            visited after it have made up for it as well as they can. GPTQ's squared error is Σ_i D_i² e_i².
        damping: the share of the mean diagonal that was added, float64 [B].
        attempts: factorizations that were tried, int64 [B]; 1 where nothing had to be raised.
    """

    feedback: torch.Tensor
    order: torch.Tensor
    cost: torch.Tensor
    damping: torch.Tensor
    attempts: torch.Tensor

    def solve(self, A: torch.Tensor) -> torch.Tensor:
        """A (H + λI)⁻¹ for A [B, R, C], float32 [B, R, C]."""
        V = self.feedback * self.cost.take_along_dim(self.order, -1).sqrt().unsqueeze(-2)
        # A P (V Vᵀ)⁻¹ with the columns in the order of the factor
        ordered = A.take_along_dim(self.order.unsqueeze(-2), -1)
        half = torch.linalg.solve_triangular(V.mT, ordered, upper=False, left=False)
        solved = torch.linalg.solve_triangular(V, half, upper=True, left=False)
        result: torch.Tensor = solved.take_along_dim(self.order.argsort(-1).unsqueeze(-2), -1)
        return result


def factorize(H: torch.Tensor, order: torch.Tensor, damping: float, max_damping: float, names: Sequence[str]) -> Factor:
    """Factor H + λI with λ = damping · mean(diag H), columns taken in `order`.

    Where the Cholesky factorization fails the damping is multiplied by 10 and tried again, up to `max_damping`.

    Args:
        H: symmetric float32 [B, C, C], or [C, C].
        order: permutation, int64 [B, C], or [C].
        damping: share of the mean diagonal to begin with.
        max_damping: largest share that is acceptable.
        names: of the layers, for messages.

    Raises:
        NumericalError: H is zero, or not positive definite even with `max_damping`.

    Source: damping from GPTQ, arXiv 2210.17323. An upper factor comes from a lower one of the reversed matrix.
    """
    mean = H.diagonal(dim1=-2, dim2=-1).mean(-1)
    require_inputs(mean, names)
    share = torch.full_like(mean, damping, dtype=torch.float64)
    attempts = torch.ones_like(mean, dtype=torch.int64)
    L, info = _cholesky(H, order, share * mean)
    while first_of(info > 0, names) is not None:
        name = first_of((info > 0) & (share * 10 > max_damping * (1 + 1e-6)), names)
        if name is not None:
            raise NumericalError(
                f"{name}: the Hessian is not positive definite with damping {float(share[info > 0].max()):g} "
                f"(the limit is {max_damping:g}); use more calibration tokens or raise quantization.max_damping"
            )
        share, attempts = torch.where(info > 0, share * 10, share), attempts + (info > 0)
        del L  # a wide layer's matrices are gigabytes: never hold one more than needed
        L, info = _cholesky(H, order, share * mean)
    V = L.flip(-2, -1)
    del L
    D = V.diagonal(dim1=-2, dim2=-1).clone()
    cost = torch.empty_like(D).scatter_(-1, order, D.square())
    return Factor(V.div_(D.unsqueeze(-2)), order, cost, share, attempts)


def require_inputs(size: torch.Tensor, names: Sequence[str]) -> None:
    """Refuse Hessians of nothing but zeros.

    Args:
        size: of each Hessian, float32 [B].
        names: of the layers.

    Raises:
        NumericalError: a size is 0.
    """
    name = first_of(~(size > 0), names)
    if name is not None:
        raise NumericalError(f"{name}: every calibration input of this layer is zero")


def _cholesky(H: torch.Tensor, order: torch.Tensor, damping: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower factor of each reordered matrix, reversed, and where one has none a number above 0."""
    size = H.shape[-1]
    P = torch.empty_like(H)
    # Copies of whole rows and columns, one layer at a time: never another matrix for each of them.
    layers = (H.reshape(-1, size, size), order.flip(-1).reshape(-1, size), P.view(-1, size, size))
    for M, reverse, out in zip(*layers, strict=True):
        torch.index_select(M.index_select(0, reverse), 1, reverse, out=out)
    P.diagonal(dim1=-2, dim2=-1).add_(damping.to(H.dtype).unsqueeze(-1))
    factor: tuple[torch.Tensor, torch.Tensor] = torch.linalg.cholesky_ex(P)
    return factor


def layer_error(W: torch.Tensor, W_hat: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Squared output error of each row [B, R]: diag((W − Ŵ) H (W − Ŵ)ᵀ), float32, W and Ŵ [B, R, C], H [B, C, C]."""
    return squared_error(W - W_hat, H)


def squared_error(E: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """diag(E H Eᵀ), float32 [B, R] for E [B, R, C] and H [B, C, C].

    H is symmetric: what is below the squares on its diagonal counts twice, and what is above them not at all.
    """
    error = torch.zeros_like(E[..., 0])
    for strip in strips(H):
        own = E[..., strip]
        product = torch.matmul(E[..., strip.stop :], H[..., strip.stop :, strip]).mul_(2)
        add_product_(product, own, H[..., strip, strip])
        error += torch.linalg.vecdot(product, own)
    return error
