"""ASER's error reconstruction: the correction of low rank that takes most from a layer's output error.

After the solve a layer misses E = W* − Ŵ, with Ŵ what is stored and W* the weights that the solve aimed at. ASER
(arXiv 2411.07762) factors the Hessian as H + λI = S Sᵀ, takes the truncated SVD of the whitened error,

    E S ≈ U_r Σ_r V_rᵀ        L_A = U_r Σ_r        L_B = V_rᵀ S⁻¹

and adds L_A L_B to Ŵ. Because ‖D X‖² = ‖D S‖² for every D, no other matrix of rank r leaves a smaller error.

S itself is not needed. V_rᵀ = Σ_r⁻¹ U_rᵀ E S, so that L_B = Σ_r⁻¹ U_rᵀ E, and U and Σ² are the eigenvectors and
eigenvalues of the second moments of the outputs' errors:

    G = (E S)(E S)ᵀ = E (H + λI) Eᵀ = U Σ² Uᵀ
    L_A L_B = U_r U_rᵀ E

So what is corrected is the part of the error within the r directions of the outputs in which it is largest.

Where inputs drifted on their way through quantized layers, x_s = x + d, the layer's outputs shall be those of the
source, W (x + γ d). With W* = W + γ W (Σ d xᵀ)(H + λI)⁻¹, which `compensate` returns, the objective is

    ‖W (x + γ d) − V x‖² + λ‖V − W‖² = const + tr((W* − V)(H + λI)(W* − V)ᵀ)        for every V = Ŵ + L_A L_B

because its gradient is 0 at V = W*. So the same formulas hold with E = W* − Ŵ.

Shapes: B layers side by side, R outputs, C inputs, rank r, k directions that are searched.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from astro.activation_config import MOST_RANK
from astro.linalg.symmetric import squared_error
from astro.linalg.tiling import every
from astro.model.low_rank import LowRank

__all__ = ["reconstruct", "remaining_errors", "subspace_work"]

_EXACT_ROWS = 512
"""Outputs up to which G is formed and decomposed whole. It depends on shapes alone, as all arithmetic does."""
_OVERSAMPLING = 16
"""Directions that are searched beside those that are wanted."""
_POWER_ITERATIONS = 8
"""Multiplications by G, each of which is one by (E S)(E S)ᵀ. Errors of rounding have a flat spectrum, which wants more
of them than the two that are usual."""
_SEED = 0
_SLAB_ELEMENTS = 1 << 24
"""Elements of E that are measured at once, so that no copy of all of it is made."""
_EIGEN_OPERATIONS = 9.0
"""Operations of a decomposition of a symmetric matrix for each of its elements and rows."""


def reconstruct(
    E: torch.Tensor, H: torch.Tensor, damping: torch.Tensor, rank: int | Literal["auto"], energy: float
) -> list[LowRank]:
    """Return the best correction of each layer.

    Args:
        E: What the weights miss, W* − Ŵ, float32 [B, R, C].
        H: The Hessians, float32 [B, C, C].
        damping: What is added to each diagonal, λ, of the dtype of H [B].
        rank: Number of directions that are corrected, at most R and C; `auto` takes the least number that holds
            `energy`, at most `MOST_RANK`.
        energy: Share of the squared error ‖E S‖² that `auto` corrects.

    Returns:
        The corrections in the dtype of E. Directions without an error are left out.
    """
    most = min(MOST_RANK if rank == "auto" else rank, *E.shape[1:])
    values, U = _leading_directions(E, H, damping, most)
    tiny = torch.finfo(E.dtype).eps * values[:, :1]
    ranks = (values > tiny).sum(-1)
    if rank == "auto":
        total = squared_error(E, H).sum(-1) + damping * E.square().sum((-1, -2))
        held = values.cumsum(-1) < energy * total.unsqueeze(-1)
        ranks = torch.minimum(ranks, held.sum(-1) + 1)
    sigma = values.clamp(min=torch.finfo(E.dtype).tiny).sqrt()
    A = (U / sigma.unsqueeze(-2)).mT @ E  # L_B = Σ_r⁻¹ U_rᵀ E
    B = U * sigma.unsqueeze(-2)  # L_A = U_r Σ_r
    return [
        LowRank(A[layer, :kept].contiguous(), B[layer, :, :kept].contiguous())
        for layer, kept in enumerate(ranks.tolist())
    ]


def remaining_errors(E: torch.Tensor, H: torch.Tensor, corrections: Sequence[LowRank]) -> list[float]:
    """Measure the error ‖(E − B A) X‖² that each layer is left with, by the factors as they are stored.

    Args:
        E: What the weights miss, float32 [B, R, C].
        H: The Hessians, float32 [B, C, C].
        corrections: The correction of each layer, in any float dtype.
    """
    errors = []
    for of_layer, of_input, factors in zip(E, H, corrections, strict=True):
        A, B = factors.A.to(E.dtype), factors.B.to(E.dtype)
        slabs = every(len(of_layer), max(1, _SLAB_ELEMENTS // E.shape[-1]))
        left = (squared_error((of_layer[rows] - B[rows] @ A)[None], of_input[None]).sum() for rows in slabs)
        errors.append(sum(left, E.new_zeros(())))
    totals: list[float] = torch.stack(errors).tolist()
    return totals


def subspace_work(num_rows: int, num_columns: int, rank: int) -> float:
    """Count the operations that it takes to find the directions in which a layer's error is largest.

    Args:
        num_rows: Outputs of the layer.
        num_columns: Inputs of the layer.
        rank: Number of directions that are wanted.
    """
    R, C = float(num_rows), float(num_columns)
    k = min(rank, num_rows, num_columns) + _OVERSAMPLING
    if num_rows <= max(_EXACT_ROWS, k):
        return 2.0 * R * C * (R + C) + _EIGEN_OPERATIONS * R**3
    step = 4.0 * R * C * k + 2.0 * C * C * k + 4.0 * R * k * k
    return (_POWER_ITERATIONS + 1) * step + _EIGEN_OPERATIONS * k**3


def _leading_directions(
    E: torch.Tensor, H: torch.Tensor, damping: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest eigenvalues [B, count] of G and their eigenvectors [B, R, count], the largest first.

    Of many outputs the space that the vectors span is found by subspace iteration from a fixed random start, with a QR
    decomposition after every step, and G is decomposed within that space (Rayleigh-Ritz).
    Source: Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4.
    """
    num_rows, searched = E.shape[1], count + _OVERSAMPLING
    if num_rows <= max(_EXACT_ROWS, searched):
        values, vectors = _eigenvectors(_weighted(E, H, damping) @ E.mT, count)
        return values, vectors
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(num_rows, searched, generator=generator, dtype=torch.float32)
    Q = start.to(E).expand(len(E), -1, -1)
    for _ in range(_POWER_ITERATIONS):
        Q, _R = torch.linalg.qr(E @ _weighted(Q.mT @ E, H, damping).mT)  # G Q
    P = Q.mT @ E
    values, vectors = _eigenvectors(_weighted(P, H, damping) @ P.mT, count)  # Qᵀ G Q
    return values, Q @ vectors


def _weighted(X: torch.Tensor, H: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    """Return X (H + λI), [B, N, C]."""
    return torch.baddbmm(X * damping[:, None, None], X, H)


def _eigenvectors(G: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest eigenvalues of symmetric matrices and their vectors, computed in float64, the largest first.

    The sign of a vector is chosen so that its largest element is positive.
    """
    values, vectors = torch.linalg.eigh(((G + G.mT) / 2).double())
    values, vectors = values.flip(-1)[..., :count].clamp(min=0), vectors.flip(-1)[..., :count]
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return values.to(G.dtype), (vectors * largest.sign()).to(G.dtype)
