"""Gradients that nobody derived."""

from collections.abc import Callable

import torch

__all__ = ["differences"]


def differences(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, step: float = 1e-6) -> torch.Tensor:
    """Return the gradient of a function of a float64 tensor by central differences."""
    gradient = torch.zeros_like(at)
    for place in range(at.numel()):
        ends = []
        for sign in (1, -1):
            moved = at.clone()
            moved.view(-1)[place] += sign * step
            ends.append(function(moved))
        gradient.view(-1)[place] = (ends[0] - ends[1]) / (2 * step)
    return gradient
