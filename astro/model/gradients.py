"""Gradients through a block that was built to be run without any, and through what is rounded in it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from astro.errors import UnsupportedError

__all__ = ["gradients", "straight_through"]

_NO_GRADIENT = ("does not require grad", "not implemented", "inplace operation", "Inference tensor")
"""What torch says where no gradient passes. Whatever else fails, memory above all, fails the call."""


@contextlib.contextmanager
def gradients(device: torch.device) -> Iterator[None]:
    """Let the body of a `with` statement take gradients, the same ones every time.

    Args:
        device: Device that computes them.

    Raises:
        UnsupportedError: The body met an operation that has no gradient.
    """
    try:
        with torch.enable_grad(), _deterministic(device.type == "cuda"):
            yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_GRADIENT):
            raise
        raise UnsupportedError(f"no gradient passes through this block: {str(error).splitlines()[0]:.200}") from error


@contextlib.contextmanager
def _deterministic(on_gpu: bool) -> Iterator[None]:
    """Let the same gradient come out of every backward pass: the usual ones on GPUs add in any order.

    Some operations have none that keeps to an order, of which torch only warns; `attention` sees to its own.
    """
    if not on_gpu:
        yield
        return
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Torch would fill all fresh memory with NaN as well, which takes as long as to write it once more.
    memory.fill_uninitialized_memory = False
    try:
        # cuDNN's kernel is left out: nothing says that it keeps to an order.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        memory.fill_uninitialized_memory = fills


def straight_through(X: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Round a tensor, and let its gradient pass as if it had stayed as it is: that of steps is zero.

    Args:
        X: The tensor, any float dtype.
        rounding: Function that returns it rounded, in its shape and dtype.
    """
    if not X.requires_grad:
        return rounding(X)
    rounded: torch.Tensor = _StraightThrough.apply(X, rounding)  # type: ignore[no-untyped-call]
    return rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, X: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return rounding(X)

    @staticmethod
    def backward(_context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None
