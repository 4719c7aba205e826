"""Astro: activation-guided structured regularization (arXiv 2602.07596), and MagR (arXiv 2406.00800) as its ablation.

Replaces W by a float W̃ of the same shape whose group maxima are smaller where the activations are large.
Per row (eq. 12):

    J(w) = ½ (w − w₀) H (w − w₀)ᵀ + β Σ_k α_k ‖w^(k)‖_∞,      H scaled to a largest eigenvalue of 1,

for groups k of g contiguous columns. Shapes: R rows, C columns, G = C/g groups.
Two solvers: the published proximal gradient, and ADMM, which comes close to the minimum in a few iterations.
"""

import dataclasses

import torch

from astro.config import Regularizer
from astro.errors import NumericalError
from astro.grid import grouped

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
"""Elementwise operations of the proximal map on all of its elements, for groups of 64 to 128."""

_NEWTON_STEPS = 5
"""At least; wide groups take more, one for each doubling. Residuals are then below 1e-5 of τ (tested)."""
_POWER_STEPS = 50


def group_activations(H: torch.Tensor, group_size: int) -> torch.Tensor:
    """Guidance α (eq. 11): each group's activation norm over the mean of all groups, float32 [G].

    ‖X^(k)‖_F² is the sum of H's diagonal over the group, so that H is all that is needed, at any scale.
    """
    norm = H.diagonal().clamp(min=0).reshape(-1, group_size).sum(1).sqrt()
    return norm / norm.mean()


def largest_eigenvalue(H: torch.Tensor) -> torch.Tensor:
    """Largest eigenvalue of a positive semidefinite matrix by power iteration, a scalar tensor on H's device."""
    v = H.diagonal()
    tiny = torch.finfo(H.dtype).tiny
    for _ in range(_POWER_STEPS):
        v = H @ (v / torch.linalg.vector_norm(v).clamp(min=tiny))
    norm: torch.Tensor = torch.linalg.vector_norm(v)
    return norm


def mean_group_maximum(W: torch.Tensor, group_size: int) -> torch.Tensor:
    """Mean over rows and groups of the group's largest |w|: the unit of a relative β, a scalar tensor."""
    return grouped(W, group_size).abs().amax(-1).mean()


def prox(V: torch.Tensor, tau: torch.Tensor, group_size: int) -> torch.Tensor:
    """Proximal map of τ_k‖·‖_∞ on each group (eq. 14-15): v − τ P₁(v/τ).

    By Moreau it clips the group at the level θ with Σ_i (|v_i| − θ)₊ = τ, and is zero where ‖v‖₁ <= τ. θ is found by
    Newton's method; no sort.

    Args:
        V: float32 [R, C].
        tau: thresholds >= 0, float32 [G].
        group_size: columns a group.

    Returns:
        float32 [R, C].
    """
    A = grouped(V, group_size).abs()
    # Both lie left of θ, from where Newton's method on a convex falling function never overshoots.
    theta = torch.maximum(A.amax(-1) - tau, (A.sum(-1) - tau) / group_size).clamp_(min=0)
    for _ in range(max(_NEWTON_STEPS, group_size.bit_length())):
        excess = (A - theta.unsqueeze(-1)).clamp_(min=0)
        count = (excess > 0).sum(-1).clamp_(min=1)
        theta = theta + (excess.sum(-1) - tau) / count
    level = theta.clamp_(min=0).unsqueeze(-1)
    return torch.clamp(grouped(V, group_size), -level, level).flatten(1)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer's regularization, prepared once for all of its rows and every β.

    Attributes:
        settings: which regularizer and which solver.
        group_size: columns a group.
        guidance: α_k in units in which β is given, float32 [G].
        operator: H/λ_max for proximal gradient; ρ(H/λ_max + ρI)⁻¹ for ADMM; float32 [C, C].
    """

    settings: Regularizer
    group_size: int
    guidance: torch.Tensor
    operator: torch.Tensor


def prepare(H: torch.Tensor, unit: torch.Tensor, settings: Regularizer, group_size: int, name: str) -> Problem:
    """Compute what every row of the layer shares.

    Args:
        H: undamped Hessian, float32 [C, C].
        unit: mean group maximum of the whole layer, used where β is relative.
        settings: which regularizer and which solver.
        group_size: columns a group.
        name: of the layer, for messages.

    Raises:
        NumericalError: H is zero, or H/λ_max + ρI is not positive definite.
    """
    largest = largest_eigenvalue(H)
    if not bool(largest > 0):
        raise NumericalError(f"{name}: every calibration input of this layer is zero")
    H = H / largest
    guidance = group_activations(H, group_size) if settings.name == "astro" else H.new_ones(H.shape[0] // group_size)
    if settings.beta_unit == "relative":
        guidance = guidance * unit
    if settings.solver == "admm":
        H.diagonal().add_(settings.rho)
        L, info = torch.linalg.cholesky_ex(H)
        del H
        if int(info):
            raise NumericalError(f"{name}: H + {settings.rho:g} λ_max is not positive definite; raise regularizer.rho")
        H = torch.cholesky_inverse(L).mul_(settings.rho)
    return Problem(settings, group_size, guidance, H)


def regularize(W: torch.Tensor, problem: Problem, beta: float) -> torch.Tensor:
    """W̃ for some rows of a layer. Rows are independent.

    Args:
        W: original weights, float32 [R, C].
        problem: prepared for the layer.
        beta: strength of the penalty.

    Returns:
        float32 [R, C].
    """
    tau = beta * problem.guidance
    return _admm(W, problem, tau) if problem.settings.solver == "admm" else _proximal_gradient(W, problem, tau)


def _proximal_gradient(W: torch.Tensor, problem: Problem, tau: torch.Tensor) -> torch.Tensor:
    Z = W
    for _ in range(problem.settings.steps):
        V = Z - (Z - W) @ problem.operator  # eq. 13, η = 1 because λ_max = 1
        Z = prox(V, tau, problem.group_size)  # eq. 14-15
    return Z


def _admm(W: torch.Tensor, problem: Problem, tau: torch.Tensor) -> torch.Tensor:
    tau = tau / problem.settings.rho
    Z, U = W, torch.zeros_like(W)
    for _ in range(problem.settings.steps):
        # argmin of the smooth part: (H + ρI) Y = H W + ρ(Z − U), written as a step from W
        Y = torch.addmm(W, Z - U - W, problem.operator)
        Y.add_(U)
        Z = prox(Y, tau, problem.group_size)
        U = Y.sub_(Z)
    return Z
