"""Whether what is to be compiled can be on a worker's machine, found out on tiny tensors before the work begins."""

import platform
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from pathlib import Path

import torch

from astro.config import LayerScheme
from astro.errors import NumericalError, RunError
from astro.linalg import compiled
from astro.process import says_out_of_memory
from astro.quantization import beta_search
from astro.quantization.column_ops import require_kernels
from astro.quantization.prepared_groups import prepare_input_groups
from astro.quantization.recipe import InputMoments, Recipe
from astro.quantization.row_solver import solve_rows

__all__ = ["require_compiled", "require_loops"]

_COMPILERS = {"cpu": ("g++", "clang++", "c++"), "cuda": ("gcc", "clang", "cc")}
"""Compilers of which torch.compile needs one, by type of device: for C++ on a CPU, for C on a GPU, where Triton builds
what starts its kernels."""
_ADVICE = (
    "Mend that on every node, or set execution.compile: false, which is slower on GPUs and, being part of the run's "
    "identity, wants another output.dir"
)
_LOOPS = "the innermost loops"
_COLUMNS, _ROWS, _GROUP_SIZE = 64, 24, 16
"""Size of the layer that is solved. No two of its sizes are equal, or a compiler could take them for the same."""


def require_loops(loops: compiled.ColumnLoops, recipe: Recipe, device: torch.device, warms_up: bool) -> None:
    """Choose how the innermost loops run in this thread, and make sure that they can.

    Args:
        loops: How they run.
        recipe: How the layers of the run are quantized.
        device: Device of the worker.
        warms_up: Whether all loops that torch.compile is to compile are compiled now, which takes up to a minute, and
            not only a tiny function. Kernels take seconds, so they are always compiled.

    Raises:
        RunError: They cannot; the message names this machine and says what is missing.
    """
    compiled.use(loops)
    if loops == "kernels":
        _require_kernels(device)
    if loops == "compiled":
        _require_compiler(device)
    if loops == "kernels" or (loops == "compiled" and warms_up):
        _warm_up(recipe, device)


def _require_kernels(device: torch.device) -> None:
    try:
        require_kernels(device)
    except NumericalError as error:
        raise RunError(f"{platform.node()}: {error}") from error


def _require_compiler(device: torch.device) -> None:
    """Compile a tiny function, which takes seconds. What was compiled before and kept on disk is not used."""
    X = torch.ones(4, 3, device=device)
    from torch._inductor.utils import fresh_cache  # late, because it imports for seconds

    with compiled.using("compiled"), fresh_cache():
        require_compiled(lambda: _difference(X, X), _LOOPS, device, _ADVICE)


def _warm_up(recipe: Recipe, device: torch.device) -> None:
    """Compile the loops of the solver on a tiny layer, as the blocks of the run will want them."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(1, _ROWS, _COLUMNS, generator=generator).to(device)
    inputs = InputMoments(torch.eye(_COLUMNS, device=device)[None] + 0.1)

    def solve() -> None:
        prepared = prepare_input_groups(["warm-up"], W, inputs, LayerScheme(group_size=_GROUP_SIZE), recipe)
        if prepared.beta is None:
            prepared = beta_search.search(prepared, W)  # which is the first to round columns
        solve_rows(prepared, W)

    require_compiled(solve, _LOOPS, device, _ADVICE)


@compiled.fused
def _difference(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Return something elementwise, for a compiler."""
    return torch.round(A * 2 - B)


def require_compiled(action: Callable[[], object], what: str, device: torch.device, advice: str) -> None:
    """Call something that compiles, and explain why it cannot.

    Args:
        action: Function that compiles when it is called.
        what: What is compiled, for the message.
        device: Device that the code is for.
        advice: What to do where it cannot be compiled.

    Raises:
        RunError: It cannot; the message names this machine and says what is missing.
    """
    try:
        action()
    except Exception as error:  # compilers of several projects have errors of their own
        if isinstance(error, MemoryError) or says_out_of_memory(str(error)):
            raise
        missing = "; ".join(_missing(device)) or "a compiler, Python's headers and the driver's library are there"
        raise RunError(
            f"{platform.node()}: {what} cannot be compiled: {_reason(error)}. Seen here: {missing}. {advice}"
        ) from error


def _missing(device: torch.device) -> Iterator[str]:
    """What compilers want and this machine lacks, each with what to install."""
    compilers = _COMPILERS["cuda" if device.type == "cuda" else "cpu"]
    if not any(map(shutil.which, compilers)):
        yield f"none of {', '.join(compilers)}: install gcc and g++"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        yield f"no Python.h in {sysconfig.get_path('include')}: install Python's headers (python3-dev)"
    if device.type == "cuda" and find_library("cuda") is None:
        yield "no libcuda.so that a linker finds: install the driver's libraries, or run ldconfig where they are"


def _reason(error: Exception) -> str:
    """Return what a compiler said, without what `compiled.fused` adds to it."""
    return compiled.first_line(error.__cause__ if isinstance(error, NumericalError) and error.__cause__ else error)
