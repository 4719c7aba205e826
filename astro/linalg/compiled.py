"""Innermost loops as few kernels, where a thread asked for it: torch.compile.

A GPU takes microseconds to start a kernel, as long as the work on one column of a tile, and elementwise chains read
and write memory once for each link. What is marked here is compiled as a whole then; what it computes is the same up to
the last bits. It is compiled on first use, for as long as a minute, and kept on disk by torch.
"""

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from astro.errors import NumericalError

__all__ = ["enable", "fused", "is_enabled"]

_VARIANTS = 64
"""Shapes that a function may be compiled for. Beyond, torch would go on uncompiled, with other last bits."""

P = ParamSpec("P")
T = TypeVar("T")


class _OfThread(threading.local):
    """What a thread asked for; torch keeps its own settings by thread as well."""

    enabled = False


_own = _OfThread()


def enable(on: bool) -> None:
    """Compile what is marked, in this thread, or do not."""
    _own.enabled = on
    if on:
        torch._dynamo.config.recompile_limit = _VARIANTS
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        # Sizes and offsets that are equal by chance in one call need not be in the next one.
        torch.fx.experimental._config.use_duck_shape = False
        # A worker is one of many on its machine, and there are few kernels: no processes for them.
        torch._inductor.config.compile_threads = 1


def is_enabled() -> bool:
    """Whether this thread compiles."""
    return _own.enabled


def fused(function: Callable[P, T]) -> Callable[P, T]:
    """The function, compiled where `enable` was called.

    Args:
        function: of tensors, without effects, and elementwise: a compiled sum's last bits would depend on the shapes
            that a process met first.

    Raises:
        NumericalError: it cannot be compiled.
    """

    @functools.cache
    def compiled() -> Callable[P, T]:
        return torch.compile(function, dynamic=True, fullgraph=True)  # imports for seconds: not before it is wanted

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _own.enabled:
            return function(*args, **kwargs)
        try:
            return compiled()(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            raise NumericalError(
                f"{function.__module__}.{function.__qualname__} cannot be compiled: {_first_line(error)}; see to a C++ "
                "compiler (g++) and Python's headers on every node, or set execution.compile to false"
            ) from error

    return call


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
