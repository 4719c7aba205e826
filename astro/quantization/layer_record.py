"""What is recorded of every quantized group of linear layers."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["LayerRecord", "fallbacks"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """Figures of one group of linear layers that read the same input and were solved together."""

    name: str
    """Module names of the members, joined by '+'."""
    bits: int
    rows: int
    columns: int
    group_size: int
    num_tokens: int
    """Calibration tokens in the Hessian."""
    routed_tokens: int
    """Calibration tokens that the model itself sends through these layers; fewer than all for experts."""
    fallback: str
    """The experts' policy where too few tokens were routed to one, else empty."""
    relative_error: float
    """‖(Ŵ − W)X‖² / ‖WX‖² on the calibration tokens, W the original weights, or where earlier errors are compensated
    the weights that do so."""
    beta: float
    """Strength of the regularization; 0 where none was done."""
    beta_gain: float
    """Share of the sampled rows' layer error before refinement that beta saved against 0; 0 where not searched."""
    width_errors: dict[int, float]
    """Relative error of the sampled rows at each width that was measured, without regularization."""
    group_maximum_ratio: float
    """Mean group maximum after regularization over before; 1 without a regularizer."""
    damping: float
    """Share of the mean diagonal that the Hessian needed; 0 where no factorization was done."""
    factorizations: int
    """Factorizations tried; more than 1 means that the damping was raised. 0 where none was done."""
    seconds: dict[str, float]
    """Time by phase: factor, compensate, beta, regularize, grid, gptq, refine, widths."""


def fallbacks(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What was degraded: layers whose damping was `damping_raised`, and those of `experts` by the policy that was used.

    Args:
        layers: records as plain dictionaries.
    """
    raised: list[str] = []
    experts: dict[str, list[str]] = {}
    for layer in layers:
        if layer["factorizations"] > 1:
            raised.append(layer["name"])
        if layer["fallback"]:
            experts.setdefault(layer["fallback"], []).append(layer["name"])
    return {"damping_raised": raised, "experts": experts}
