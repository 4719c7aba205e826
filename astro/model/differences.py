"""How far tensors lie apart that are the same but for rounding, or but for a factor of each channel."""

import math

import torch

from astro.model.block_call import BlockState

__all__ = ["TOLERANCE_EPS", "difference", "is_same", "largest_difference", "multiplied_channels"]

TOLERANCE_EPS = 64
"""Units of the last place by which something may differ that was only multiplied by powers of two."""


def largest_difference(state: BlockState, other: BlockState) -> float:
    """Return how far two states lie apart in anything that passes to the next block, relative to the largest value.

    Args:
        state: A state.
        other: Another state.

    Returns:
        The largest difference; infinity where they do not hold the same kinds of things.
    """
    if state.others.keys() != other.others.keys():
        return math.inf
    pairs = [(state.hidden, other.hidden), *((value, other.others[name]) for name, value in state.others.items())]
    return max(difference(*pair) for pair in pairs)


def difference(A: torch.Tensor, B: torch.Tensor) -> float:
    """Return how far two tensors lie apart, relative to the largest value of the second.

    Args:
        A: A tensor.
        B: Another tensor.

    Returns:
        The largest difference; infinity where shapes differ, or integers do.
    """
    if A.shape != B.shape:
        return math.inf
    if not A.is_floating_point():
        return 0.0 if torch.equal(A, B) else math.inf
    if not A.numel() or torch.equal(A, B):
        return 0.0
    largest = float((A - B).abs().max() / B.abs().max())
    return largest if math.isfinite(largest) else math.inf


def is_same(A: torch.Tensor, B: torch.Tensor) -> bool:
    """Tell whether two tensors are the same but for rounding.

    Args:
        A: A tensor.
        B: Another tensor.
    """
    return difference(A, B) <= TOLERANCE_EPS * torch.finfo(A.dtype).eps


def multiplied_channels(X: torch.Tensor, before: torch.Tensor, factor: float) -> torch.Tensor | None:
    """Say of each channel whether it was multiplied.

    Args:
        X: Channels [..., C].
        before: Channels as they were [..., C].
        factor: Factor of those that were multiplied.

    Returns:
        Whether each channel is `factor` times what it was, bool [C]; None where one is neither that nor the same.
    """
    X, before = X.reshape(-1, X.shape[-1]), before.reshape(-1, before.shape[-1])
    if X.shape != before.shape:
        return None
    allowed = TOLERANCE_EPS * torch.finfo(X.dtype).eps * before.abs().amax(0)
    is_unchanged, is_multiplied = ((X - times * before).abs().amax(0) <= allowed for times in (1, factor))
    return is_multiplied if bool((is_unchanged ^ is_multiplied).all()) else None
