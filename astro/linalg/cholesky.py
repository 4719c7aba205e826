"""Triangular factors of damped Hessians.

In shapes, R is the number of rows, C of columns (inputs of the layer) and B of layers that are solved side by side.
"""

import dataclasses
from collections.abc import Sequence

import torch

from astro.errors import NumericalError
from astro.linalg.batching import first_of

__all__ = ["Factor", "factorize", "require_inputs"]

_BATCHED_COLUMNS = 1024
"""Columns up to which a GPU factors matrices side by side. It is reckoned, not measured: a float32 matrix of C columns
takes C³/3 operations, at some 50 GFLOP/s 7 ms for 1024 and 57 ms for 2048 columns where each has a processor for
itself, and about 1 and 2 ms where it has all 132 of them. Tiles hold 32 matrices of 2048 columns, or 128 of 1024."""


@dataclasses.dataclass(frozen=True)
class Factor:
    """Triangular factors of the damped, reordered Hessians of B layers. Those of a single layer may lack the [B].

    Attributes:
        feedback: Unit upper triangular N, float32 [B, C, C], with H[order][:, order] + λI = (N D)(N D)ᵀ, D diagonal.
        order: Columns in the order in which they are visited, int64 [B, C].
        cost: D² in the original column order, float32 [B, C]. It is what a unit error of a column costs once the
            columns visited after it have made up for it as well as they can: GPTQ's squared error is Σ_i D_i² e_i².
        damping: Share of the mean diagonal that was added, float64 [B].
        attempts: Number of factorizations that were tried, int64 [B]. It is 1 where the damping was not raised.
    """

    feedback: torch.Tensor
    order: torch.Tensor
    cost: torch.Tensor
    damping: torch.Tensor
    attempts: torch.Tensor

    def solve(self, A: torch.Tensor) -> torch.Tensor:
        """Return A (H + λI)⁻¹.

        Args:
            A: The left factor, float32 [B, R, C].

        Returns:
            The product, float32 [B, R, C].
        """
        # A P (N D² Nᵀ)⁻¹ with the columns in the order of the factor; D scales columns, so that N D is never formed.
        ordered = A.take_along_dim(self.order.unsqueeze(-2), -1)
        N, cost = self.feedback, self.cost.take_along_dim(self.order, -1).unsqueeze(-2)
        half = torch.linalg.solve_triangular(N.mT, ordered, upper=False, left=False, unitriangular=True)
        solved = torch.linalg.solve_triangular(N, half.div_(cost), upper=True, left=False, unitriangular=True)
        result: torch.Tensor = solved.take_along_dim(self.order.argsort(-1).unsqueeze(-2), -1)
        return result


def factorize(H: torch.Tensor, order: torch.Tensor, damping: float, max_damping: float, names: Sequence[str]) -> Factor:
    """Factor H + λI with λ = damping · mean(diag H), with the columns in the given order.

    Where the Cholesky factorization of a layer fails, its damping is multiplied by 10 and it is factored again, up to
    `max_damping`. The damping comes from GPTQ, arXiv 2210.17323. The upper factor of a matrix is the reversed lower
    factor of the reversed matrix.

    Args:
        H: The symmetric Hessians, float32 [B, C, C] or [C, C].
        order: Permutation of the columns, int64 [B, C] or [C].
        damping: Share of the mean diagonal that is added at first.
        max_damping: Largest share of the mean diagonal that may be added.
        names: Names of the layers, for messages.

    Returns:
        The factors of all layers.

    Raises:
        NumericalError: H is zero, or not positive definite even with `max_damping`.
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
    """Refuse Hessians that hold nothing but zeros.

    Args:
        size: Size of each Hessian, such as the mean of its diagonal, float32 [B].
        names: Names of the layers, for messages.

    Raises:
        NumericalError: A size is not above 0.
    """
    name = first_of(~(size > 0), names)
    if name is not None:
        raise NumericalError(
            f"{name}: every calibration input of this layer is zero, so that nothing says how to round it; name it in "
            "quantization.ignore, which leaves it as it is, or give text that reaches it"
        )


def _cholesky(H: torch.Tensor, order: torch.Tensor, damping: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lower factor of each matrix in reversed order, and a status above 0 for each that has no factor."""
    size = H.shape[-1]
    P = torch.empty_like(H)
    # Whole rows and columns are copied a layer at a time, so that there is never another matrix for each layer.
    layers = (H.reshape(-1, size, size), order.flip(-1).reshape(-1, size), P.view(-1, size, size))
    for M, reverse, out in zip(*layers, strict=True):
        torch.index_select(M.index_select(0, reverse), 1, reverse, out=out)
    P.diagonal(dim1=-2, dim2=-1).add_(damping.to(H.dtype).unsqueeze(-1))
    if _is_faster_one_by_one(P):
        L = torch.empty_like(P).mT  # columns lie together, as LAPACK wants them, so that factors need no copy
        info = torch.empty(len(P), dtype=torch.int32, device=P.device)
        for M, *factor in zip(P, L, info, strict=True):
            torch.linalg.cholesky_ex(M, out=tuple(factor))
        return L, info
    factors: tuple[torch.Tensor, torch.Tensor] = torch.linalg.cholesky_ex(P)
    return factors


def _is_faster_one_by_one(P: torch.Tensor) -> bool:
    """Tell whether the device should factor matrices [B, C, C] or [C, C] one after the other.

    A CPU does so by itself. On a GPU a batch goes to cuSOLVER's potrfBatched, which gives each matrix to few of the
    GPU's processors and is made for small ones; a single matrix is cut into products that fill the whole GPU.
    """
    return P.device.type == "cuda" and len(P) > 1 and P.ndim == 3 and P.shape[-1] > _BATCHED_COLUMNS
