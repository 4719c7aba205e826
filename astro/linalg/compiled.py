"""How the innermost loops run, which each thread chooses for itself.

A GPU takes microseconds to start a kernel, as long as the work on a column of a tile takes, and a chain of elementwise
operations reads and writes memory once for each link. So there are three ways, whose results are the same up to the
last bits:

- "plain": as single operations of torch. This is the reference, and what a CPU does.
- "compiled": functions that are marked with `fused` are compiled by torch as a whole. They are compiled on their first
  call, which takes up to a minute, and torch keeps the result on disk.
- "kernels": whole blocks of columns are settled by kernels that are written for it
  (`astro.quantization.column_kernels`). They are compiled in seconds.
"""

import functools
import threading
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

import torch

from astro.errors import NumericalError

__all__ = ["ColumnLoops", "fused", "is_enabled", "run_by_kernels", "use"]

ColumnLoops = Literal["plain", "compiled", "kernels"]
"""How the innermost loops run."""

_VARIANTS = 64
"""Variants of a function that may be compiled. With more, torch would go on uncompiled, with other last bits."""

P = ParamSpec("P")
T = TypeVar("T")


class _OfThread(threading.local):
    """What the current thread chose. Torch keeps its settings by thread as well."""

    loops: ColumnLoops = "plain"


_thread = _OfThread()


def use(loops: ColumnLoops) -> None:
    """Choose how the innermost loops run in this thread.

    Args:
        loops: The way from now on.
    """
    _thread.loops = loops
    if loops == "compiled":
        torch._dynamo.config.recompile_limit = _VARIANTS
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        # Sizes and offsets that are equal by chance in one call need not be in the next one.
        torch.fx.experimental._config.use_duck_shape = False
        # Many workers share a machine, and there are few kernels: processes that compile them would only be in the way.
        torch._inductor.config.compile_threads = 1


def is_enabled() -> bool:
    """Return whether this thread compiles marked functions."""
    return _thread.loops == "compiled"


def run_by_kernels() -> bool:
    """Return whether this thread settles blocks of columns by kernels that are written for it."""
    return _thread.loops == "kernels"


def fused(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function that is compiled in threads which chose that.

    Args:
        function: The function. It takes tensors, has no side effects and is elementwise, because the last bits of a
            compiled sum would depend on the shapes that a process met first.

    Returns:
        A function with the same arguments and results. It raises NumericalError where the function cannot be
        compiled.
    """

    @functools.cache
    def compiled() -> Callable[P, T]:
        return torch.compile(function, dynamic=True, fullgraph=True)  # late, because it imports for seconds

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if _thread.loops != "compiled":
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
