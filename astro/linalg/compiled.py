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

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, ParamSpec, TypeVar

import torch

from astro.errors import NumericalError

__all__ = ["ColumnLoops", "carried", "first_line", "fused", "is_enabled", "run_by_kernels", "use", "using"]

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
        for settings, values in _compiler_settings():
            for name, value in values.items():
                setattr(settings, name, value)


@contextlib.contextmanager
def using(loops: ColumnLoops) -> Iterator[None]:
    """Choose how the innermost loops run in this thread while the body of a `with` statement runs.

    Args:
        loops: The way until then. Afterwards torch's compiler has the settings that it had.
    """
    before = _thread.loops
    _thread.loops = loops
    try:
        with contextlib.ExitStack() as changed:
            for settings, values in _compiler_settings() if loops == "compiled" else ():
                changed.enter_context(settings.patch(values))
            yield
    finally:
        _thread.loops = before


def _compiler_settings() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield what marked functions ask of torch's compiler, by module of settings."""
    yield torch._dynamo.config, {"recompile_limit": _VARIANTS, "fail_on_recompile_limit_hit": True}
    # Sizes and offsets that are equal by chance in one call need not be in the next one.
    yield torch.fx.experimental._config, {"use_duck_shape": False}
    # Many workers share a machine, and there are few kernels: processes that compile them would only be in the way.
    yield torch._inductor.config, {"compile_threads": 1}
    # The fastest of several kernels, measured anew in every process, need not be the same one twice.
    measured = ("triton.autotune_pointwise", "max_autotune_pointwise", "max_autotune", "coordinate_descent_tuning")
    yield torch._inductor.config, dict.fromkeys(measured, False)


def carried(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that runs as this thread chose, whichever thread calls it.

    Autograd calls the backward functions of a GPU in threads of its own, which chose nothing.

    Args:
        function: A function that calls marked ones, or is marked.
    """
    loops = _thread.loops

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with using(loops):
            return function(*args, **kwargs)

    return call


def is_enabled() -> bool:
    """Return whether this thread compiles marked functions."""
    return _thread.loops == "compiled"


def run_by_kernels() -> bool:
    """Return whether this thread settles blocks of columns by kernels that are written for it."""
    return _thread.loops == "kernels"


def fused(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function that is compiled in threads which chose that.

    Args:
        function: The function. It takes tensors and has no side effects. Where results must have the same bits in
            every process it is elementwise, because the last bits of a compiled sum depend on the shapes that a process
            met first.

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
                f"{function.__module__}.{function.__qualname__} cannot be compiled: {first_line(error)}; see to a C++ "
                "compiler (g++) and Python's headers on every node, or set execution.compile to false"
            ) from error

    return call


def first_line(error: BaseException) -> str:
    """Return the line of a compiler's error that says what is wrong.

    Args:
        error: The error.
    """
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line and not line.endswith("raised:")), type(error).__name__)
