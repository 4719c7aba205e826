"""Inverses of symmetric positive definite matrices, taken by halves so that nearly all work is matrix products.

With M = [[A, Bᵀ], [B, D]] and its Schur complement S = D − B A⁻¹ Bᵀ,

    M⁻¹ = [[A⁻¹ + A⁻¹ Bᵀ S⁻¹ B A⁻¹,  −A⁻¹ Bᵀ S⁻¹], [−S⁻¹ B A⁻¹,  S⁻¹]].

This takes as many operations as a Cholesky factor does, C³, in two thirds of the memory. It is meant for matrices whose
eigenvalues are no more than four orders of magnitude apart: beyond, the Schur complement loses digits that a
factorization keeps.
"""

import torch

from astro.linalg.batching import add_product_
from astro.linalg.symmetric import mirror_, strips

__all__ = ["invert_"]

_LEAST = 256
"""Matrices of at most so many columns are inverted through their Cholesky factor."""


def invert_(M: torch.Tensor) -> torch.Tensor:
    """Replace symmetric positive definite matrices by their inverses.

    Args:
        M: The matrices, float32 [B, C, C], which are overwritten. Elements above the diagonal are not read.

    Returns:
        The status of each matrix, int32 [B]. It is above 0 where a matrix is not positive definite; M then holds
        nothing of use there.
    """
    size = M.shape[-1]
    if size <= _LEAST:
        L, info = torch.linalg.cholesky_ex(M)
        status: torch.Tensor = info
        # A failed factor may have a 0 on its diagonal, which would raise here, before the caller can name the layer.
        identity = torch.eye(size, dtype=M.dtype, device=M.device)
        M.copy_(torch.cholesky_inverse(torch.where(status[..., None, None] > 0, identity, L)))
        return status
    half = size // 2
    A, B, D = M[..., :half, :half], M[..., half:, :half], M[..., half:, half:]
    status = invert_(A)
    BA = B @ A
    _add_lower_(D, BA, B.mT, alpha=-1)
    status = torch.maximum(status, invert_(D))
    torch.matmul(D, BA, out=B)
    _add_lower_(A, BA.mT, B, alpha=1)
    mirror_(A.mT)
    M[..., :half, half:] = B.neg_().mT
    return status


def _add_lower_(S: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float) -> None:
    """Add α A B, which is symmetric, to S: only the strips on and below the diagonal, half of the work."""
    for strip in strips(S):
        add_product_(S[..., strip.start :, strip], A[..., strip.start :, :], B[..., strip], alpha=alpha)
