"""Weights that make up for errors in the inputs of their layer: those of layers before, and what rounding takes.

Sources: quantization error propagation, arXiv 2504.09629; asymmetric calibration, arXiv 2504.02692.
Shapes: B input groups side by side, mostly 1; R rows of all members of an input group together, C columns.
"""

import torch

from astro.linalg.symmetric import layer_error
from astro.quantization.prepared_groups import InputGroups
from astro.quantization.sampled_rows import sample_rows
from astro.timing import timed

__all__ = ["USUAL_SHARE", "behind_errors", "behind_rounding", "compensate", "reproducible_share"]

USUAL_SHARE = 0.25
"""Share of earlier errors to make up for where the text is in one piece, so that no two halves can be compared."""

_TINY = torch.finfo(torch.float32).tiny


def compensate(input_groups: InputGroups, W: torch.Tensor) -> torch.Tensor:
    """Return the weights that bring a layer's outputs back towards those of the source model.

    With x_s = x + d the inputs in the source model, W* minimizes ‖W (x + γ d) − W* x̂‖² + λ‖W* − W‖² over the tokens,
    where x̂ are the inputs x as a server rounds them. It is found in two steps, the first for γ d and the second for
    what rounding takes from x, of which all is made up for:

        W' = W + γ W (Σ d x̂ᵀ) (H + λI)⁻¹        W* = W' + W' (Σ (x − x̂) x̂ᵀ) (H + λI)⁻¹

    Args:
        input_groups: The input groups, prepared from all rows.
        W: Original weights of some rows of each, float32 [B, R, C].
    """
    return behind_rounding(input_groups, behind_errors(input_groups, W))


def behind_errors(input_groups: InputGroups, W: torch.Tensor) -> torch.Tensor:
    """Return the weights that make up for errors that were made before the layer; their outputs are wanted.

    Args:
        input_groups: The input groups, prepared from all rows.
        W: Original weights of some rows of each, float32 [B, R, C].
    """
    return _behind(input_groups, W, input_groups.drift, input_groups.share[:, None, None])


def behind_rounding(input_groups: InputGroups, W: torch.Tensor) -> torch.Tensor:
    """Return W*, which makes up for what rounding takes from the layer's inputs.

    Args:
        input_groups: The input groups, prepared from all rows.
        W: Weights that make up for errors before the layer, some rows of each, float32 [B, R, C].
    """
    rounding, share = input_groups.inputs.rounding, input_groups.recipe.solver.compensation
    drift = None if rounding is None or share == 0 else rounding.drift
    return _behind(input_groups, W, drift, 1.0 if share == "auto" else share)


def _behind(
    input_groups: InputGroups, W: torch.Tensor, drift: torch.Tensor | None, share: torch.Tensor | float
) -> torch.Tensor:
    if drift is None or input_groups.factor is None:
        return W
    with timed(input_groups.seconds, "compensate", W.device):
        return W + input_groups.factor.solve((W @ drift).mul_(share))


def reproducible_share(input_groups: InputGroups, W: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Return the share γ of the correction ΔW = W (Σ d xᵀ) (H + λI)⁻¹ that two halves of the text agree on.

    With ΔW₁ and ΔW₂ from the halves' drifts D ± Δ alone, products taken under H:

        γ = ⟨ΔW₁, ΔW₂⟩ / ½ (‖ΔW₁‖² + ‖ΔW₂‖²) = (‖ΔW_D‖² − ‖ΔW_Δ‖²) / (‖ΔW_D‖² + ‖ΔW_Δ‖²)

    Where the halves are uneven, Δ is scaled so that γ tends to what even ones would give.

    It is measured on sampled rows, and lies between 0 and 1.

    Args:
        input_groups: The input groups, factored.
        W: Weights of all members of each, float32 [B, R, C].
        spread: How far the halves' drifts lie apart, Δ, as `InputSums.spread_` returns it, float32 [B, C, C].

    Returns:
        The share of each input group, float32 [B].
    """
    assert input_groups.drift is not None
    assert input_groups.factor is not None
    rows, factor, H = sample_rows(W), input_groups.factor, input_groups.H
    with timed(input_groups.seconds, "compensate", W.device):
        common, apart = (
            layer_error(factor.solve(rows @ drift), torch.zeros_like(rows), H).sum(-1)
            for drift in (input_groups.drift, spread)
        )
    return ((common - apart) / (common + apart).clamp(min=_TINY)).clamp(0, 1)
