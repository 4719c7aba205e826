"""Astro: activation-guided structured regularization (arXiv 2602.07596), and MagR (arXiv 2406.00800) as its ablation.

Replaces W by a float W̃ of the same shape whose group maxima are smaller where the activations are large.
Per row (eq. 12):

    J(w) = ½ (w − w₀) H (w − w₀)ᵀ + β Σ_k α_k ‖w^(k)‖_∞,      H scaled to a largest eigenvalue of 1,

for groups k of g contiguous columns. Shapes: R rows, C columns, G = C/g groups, B layers side by side.
Two solvers: the published proximal gradient, and ADMM, which comes close to the minimum in a few iterations. ADMM's
products may round their factors to bfloat16 (`astro.linalg.bf16_matmul`): what they give is a step from W, small beside
it.
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
"""Elementwise operations of the proximal map on all of its elements, for groups of 64 to 128."""

_NEWTON_STEPS = 5
"""At least; wide groups take more, one for each doubling. Residuals are then below 1e-5 of τ (tested)."""
_POWER_STEPS = 50


def group_activations(H: torch.Tensor, group_size: int) -> torch.Tensor:
    """Guidance α (eq. 11): each group's activation norm over the mean of all groups, float32 [B, G].

    ‖X^(k)‖_F² is the sum of H's diagonal over the group, so that H is all that is needed, at any scale.
    """
    norm = grouped(H.diagonal(dim1=-2, dim2=-1).clamp(min=0), group_size).sum(-1).sqrt()
    return norm / norm.mean(-1, keepdim=True)


def largest_eigenvalue(H: torch.Tensor) -> torch.Tensor:
    """Largest eigenvalues of positive semidefinite matrices [B, C, C] by power iteration, [B] on their device."""
    v = H.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    tiny = torch.finfo(H.dtype).tiny
    for _ in range(_POWER_STEPS):
        v = H @ (v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp(min=tiny))
    norm: torch.Tensor = torch.linalg.vector_norm(v, dim=(-2, -1))
    return norm


def mean_group_maximum(W: torch.Tensor, group_size: int) -> torch.Tensor:
    """Mean over rows and groups of the group's largest |w|: the unit of a relative β, [B]."""
    return grouped(W, group_size).abs().amax(-1).mean((-2, -1))


def prox(V: torch.Tensor, tau: torch.Tensor, group_size: int) -> torch.Tensor:
    """Proximal map of τ_k‖·‖_∞ on each group (eq. 14-15): v − τ P₁(v/τ).

    By Moreau it clips the group at the level θ with Σ_i (|v_i| − θ)₊ = τ, and is zero where ‖v‖₁ <= τ. θ is found by
    Newton's method; no sort.

    Args:
        V: float32 [B, R, C], or [R, C].
        tau: thresholds >= 0, float32 [B, 1, G], or [B, R, G] where each row has its own.
        group_size: columns a group.

    Returns:
        float32 [B, R, C].
    """
    tau = tau.expand(*V.shape[:-1], -1)
    result = torch.empty_like(V)
    for rows in near_rows(V):
        result[..., rows, :] = _clipped(V[..., rows, :], tau[..., rows, :], group_size)
    return result


def _clipped(V: torch.Tensor, tau: torch.Tensor, group_size: int) -> torch.Tensor:
    """The proximal map for thresholds of every row, [B, R, G]."""
    A = grouped(V, group_size).abs()
    # Both lie left of θ, from where Newton's method on a convex falling function never overshoots.
    theta = torch.maximum(A.amax(-1) - tau, (A.sum(-1) - tau) / group_size).clamp_(min=0)
    for _ in range(max(_NEWTON_STEPS, group_size.bit_length())):
        excess = (A - theta.unsqueeze(-1)).clamp_(min=0)
        count = excess.sign().sum(-1).clamp_(min=1)  # of floats, exact: a comparison's bytes take three times as long
        theta = theta + (excess.sum(-1) - tau) / count
    level = theta.clamp_(min=0).unsqueeze(-1)
    return torch.clamp(grouped(V, group_size), -level, level).flatten(-2)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The regularization of layers, prepared once for all of their rows and every β.

    Attributes:
        settings: which regularizer and which solver.
        group_size: columns a group.
        guidance: α_k in units in which β is given, float32 [B, G].
        operator: [B, C, C], H/λ_max in float32 for proximal gradient; ρ(H/λ_max + ρI)⁻¹ for ADMM, in bfloat16 where
            the device is faster with it.
    """

    settings: Regularizer
    group_size: int
    guidance: torch.Tensor
    operator: torch.Tensor


def prepare(
    H: torch.Tensor, unit: torch.Tensor, settings: Regularizer, group_size: int, names: Sequence[str]
) -> Problem:
    """Compute what every row of a layer shares.

    Args:
        H: undamped Hessians, float32 [B, C, C], or [C, C].
        unit: mean group maximum of each whole layer [B], used where β is relative.
        settings: which regularizer and which solver.
        group_size: columns a group.
        names: of the layers, for messages.

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
    """W̃ for some rows of each layer. Rows are independent.

    Args:
        W: original weights, float32 [B, R, C], or [R, C].
        problem: prepared for the layers.
        beta: strength of the penalty, one for all, or of rows [B, R], or of layers [B, 1]. Where it is 0 weights stay
            as they are.

    Returns:
        float32 [B, R, C].
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
