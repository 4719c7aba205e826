"""Astro: activation-guided structured regularization (arXiv 2602.07596), and MagR (arXiv 2406.00800) as its ablation.

It replaces W by a float W̃ of the same shape whose group maxima are smaller where the activations are large. Each row of
W̃ minimizes (eq. 12)

    J(w) = ½ (w − w₀) H (w − w₀)ᵀ + β Σ_k α_k ‖w^(k)‖_∞,      H scaled to a largest eigenvalue of 1,

where w₀ is the original row and k runs over groups of g contiguous columns. There are two solvers: the published
proximal gradient, and ADMM, which comes close to the minimum in a few iterations. The products of ADMM may round their
factors to bfloat16 (`astro.linalg.bf16_matmul`), because what they give is a step from W that is small beside W.
Shapes: R rows, C columns, G = C/g groups, B layers side by side.
"""

import dataclasses
from collections.abc import Sequence

import torch

from astro.config import Regularizer
from astro.errors import NumericalError
from astro.linalg.batching import first_of
from astro.linalg.bf16_matmul import operand, product
from astro.linalg.cholesky import require_inputs
from astro.linalg.spd_inverse import invert_
from astro.linalg.tiling import near_rows
from astro.quantization.grid import grouped

__all__ = [
    "PROX_PASSES",
    "Problem",
    "group_activations",
    "largest_eigenvalue",
    "mean_group_maximum",
    "prepare",
    "prox",
    "regularize",
]

PROX_PASSES = 45
"""Number of elementwise operations that the proximal map applies to each element, for groups of 64 to 128 columns."""
_NEWTON_STEPS = 5
"""The fewest steps of Newton's method; wide groups take more, one for each doubling. Residuals are then below 1e-5 of τ
(tested)."""
_POWER_STEPS = 50
"""Steps of the power iteration."""


def group_activations(H: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the guidance α (eq. 11): the activation norm of each group over the mean of all groups.

    ‖X^(k)‖_F² is the sum of the diagonal of H over the group, so that only H is needed.

    Args:
        H: Undamped Hessians at any scale, float32 [B, C, C], or [C, C].
        group_size: Number of columns in a group.

    Returns:
        The guidance, float32 [B, G], or [G].
    """
    norm = grouped(H.diagonal(dim1=-2, dim2=-1).clamp(min=0), group_size).sum(-1).sqrt()
    return norm / norm.mean(-1, keepdim=True)


def largest_eigenvalue(H: torch.Tensor) -> torch.Tensor:
    """Return the largest eigenvalues [B] of positive semidefinite matrices [B, C, C], found by power iteration."""
    v = H.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    tiny = torch.finfo(H.dtype).tiny
    for _ in range(_POWER_STEPS):
        v = H @ (v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp(min=tiny))
    norm: torch.Tensor = torch.linalg.vector_norm(v, dim=(-2, -1))
    return norm


def mean_group_maximum(W: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the mean over rows and groups of a group's largest |w|, [B] of W [B, R, C]: the unit of a relative β."""
    return grouped(W, group_size).abs().amax(-1).mean((-2, -1))


def prox(V: torch.Tensor, tau: torch.Tensor, group_size: int) -> torch.Tensor:
    """Apply the proximal map of τ_k‖·‖_∞ to each group (eq. 14-15): v − τ P₁(v/τ).

    By Moreau's identity the map clips the group at the level θ with Σ_i (|v_i| − θ)₊ = τ, and is zero where ‖v‖₁ <= τ.
    Newton's method finds θ without a sort.

    Args:
        V: Points, float32 [B, R, C], or [R, C].
        tau: Thresholds, at least 0, float32 [B, 1, G], or [B, R, G] where each row has its own.
        group_size: Number of columns in a group.

    Returns:
        The mapped points, float32 [B, R, C], or [R, C].
    """
    tau = tau.expand(*V.shape[:-1], -1)
    result = torch.empty_like(V)
    for rows in near_rows(V):
        result[..., rows, :] = _clipped(V[..., rows, :], tau[..., rows, :], group_size)
    return result


def _clipped(V: torch.Tensor, tau: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the proximal map for thresholds of every row, [B, R, G]."""
    A = grouped(V, group_size).abs()
    # Both bounds lie left of θ, from where Newton's method on a convex falling function never overshoots.
    theta = torch.maximum(A.amax(-1) - tau, (A.sum(-1) - tau) / group_size).clamp_(min=0)
    for _ in range(max(_NEWTON_STEPS, group_size.bit_length())):
        excess = (A - theta.unsqueeze(-1)).clamp_(min=0)
        count = excess.sign().sum(-1).clamp_(min=1)  # floats count exactly, in a third of the time of bools
        theta = theta + (excess.sum(-1) - tau) / count
    level = theta.clamp_(min=0).unsqueeze(-1)
    return torch.clamp(grouped(V, group_size), -level, level).flatten(-2)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The regularization of layers, prepared once for all of their rows and every β.

    Attributes:
        settings: The regularizer and its solver.
        group_size: Number of columns in a group.
        guidance: Guidance α_k in the unit of β, float32 [B, G].
        operator: What a step of the solver multiplies by, [B, C, C]: H/λ_max in float32 for the proximal gradient, and
            ρ(H/λ_max + ρI)⁻¹ for ADMM, in bfloat16 where the device is faster with it.
    """

    settings: Regularizer
    group_size: int
    guidance: torch.Tensor
    operator: torch.Tensor


def prepare(
    H: torch.Tensor, unit: torch.Tensor, settings: Regularizer, group_size: int, names: Sequence[str]
) -> Problem:
    """Compute what all rows of a layer share.

    Args:
        H: Undamped Hessians, float32 [B, C, C], or [C, C].
        unit: Mean group maximum of each whole layer, float32 [B], which is used where β is relative.
        settings: The regularizer and its solver.
        group_size: Number of columns in a group.
        names: Names of the layers, for messages.

    Returns:
        The problem of the layers.

    Raises:
        NumericalError: H is zero, or H/λ_max + ρI is not positive definite.
    """
    largest = largest_eigenvalue(H)
    require_inputs(largest, names)
    H = H / largest.unsqueeze(-1).unsqueeze(-1)
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    guidance = (
        group_activations(H, group_size) if settings.name == "astro" else torch.ones_like(diagonal[..., ::group_size])
    )
    if settings.beta_unit == "relative":
        guidance = guidance * unit.unsqueeze(-1)
    if settings.solver == "admm":
        diagonal.add_(settings.rho)
        name = first_of(invert_(H) > 0, names)
        if name is not None:
            raise NumericalError(f"{name}: H + {settings.rho:g} λ_max is not positive definite; raise regularizer.rho")
        H = operand(H.mul_(settings.rho))
    return Problem(settings, group_size, guidance, H)


def regularize(W: torch.Tensor, problem: Problem, beta: torch.Tensor | float) -> torch.Tensor:
    """Regularize some rows of each layer. Rows are independent.

    Args:
        W: Original weights, float32 [B, R, C], or [R, C].
        problem: The problem that was prepared for the layers.
        beta: Strength of the penalty: one for all rows, one for each row [B, R], or one for each layer [B, 1]. Where it
            is 0 weights stay as they are.

    Returns:
        The regularized weights W̃, float32 [B, R, C], or [R, C].
    """
    if isinstance(beta, torch.Tensor):
        assert beta.ndim == W.ndim - 1, f"beta {list(beta.shape)} for weights {list(W.shape)}"
        beta = beta.to(W.dtype).unsqueeze(-1)
    tau = beta * problem.guidance.unsqueeze(-2)
    return _admm(W, problem, tau) if problem.settings.solver == "admm" else _proximal_gradient(W, problem, tau)


def _proximal_gradient(W: torch.Tensor, problem: Problem, tau: torch.Tensor) -> torch.Tensor:
    Z = W
    for _ in range(problem.settings.steps):
        V = Z - (Z - W) @ problem.operator  # eq. 13, η = 1 because λ_max = 1
        Z = prox(V, tau, problem.group_size)  # eq. 14-15
    return Z


def _admm(W: torch.Tensor, problem: Problem, tau: torch.Tensor) -> torch.Tensor:
    tau = tau / problem.settings.rho
    Z = prox(W, tau, problem.group_size)  # the first iteration: its smooth part is least at W
    U = W - Z
    for _ in range(problem.settings.steps - 1):
        # argmin of the smooth part: (H + ρI) Y = H W + ρ(Z − U), written as a step from W
        Y = product(operand(Z - U - W), problem.operator).add_(W).add_(U)
        Z = prox(Y, tau, problem.group_size)
        U = Y.sub_(Z)
    return Z
