"""Settings and measures of the whole process: its threads, the precision of its products, and its memory.

Threads and precision: the bits of a result depend on both. `configure_process` sets them once, at the entry point;
nothing is set when a module is imported.

Freed memory: the system clears every page that it hands out, and fresh pages for each array of a forward take a CPU a
tenth of its time. So freed memory is kept for the next array while a block is worked on, and returned afterwards. These
are calls of glibc; with another C library they do nothing.

Peak memory: a worker reports the most memory that it ever held.
"""

import ctypes
import os
import resource
from collections.abc import Callable

import torch
import transformers

__all__ = [
    "configure_process", "keep_freed_memory", "peak_rss_bytes", "return_freed_memory", "says_out_of_memory",
    "set_allocator",
]  # fmt: skip

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 << 20
"""Size in bytes above which an array, such as a wide layer's Hessian, is given back as soon as it is freed. It is the
largest value that every glibc takes."""
_NO_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
"""What messages say where memory could not be had: of CUDA and torch, of torch on a CPU, of cuBLAS and cuSOLVER."""
_ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_MOST_KEPT = 128 << 20
"""Bytes of free memory that are kept behind all memory that is in use."""


def configure_process(threads: int) -> None:
    """Make the arithmetic of this process reproducible: its number of threads, and products that are summed in float32.

    It also silences transformers, whose messages would come from every worker.

    Args:
        threads: Number of threads that torch's CPU operations use.
    """
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    # Products of 16-bit factors may be split along the inner dimension, and the sums of the parts rounded to 16 bits.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # Read when the first product is formed. Without it cuBLAS may sum in another order where streams overlap, and torch
    # refuses products where all that it does must be deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def set_allocator() -> None:
    """Let torch put blocks of a GPU's memory together, unless the user says how it allocates.

    Layers of many widths leave gaps in which the next one finds no room. Torch reads the setting once, when a process
    first uses a GPU. So every function that may be the first to use one calls this before.
    """
    if not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
        os.environ[_ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def keep_freed_memory() -> bool:
    """Let this process use freed memory again instead of asking for new pages.

    Returns:
        Whether the C library can do that.
    """
    mallopt = _of_c_library("mallopt")
    # Both are needed: after the second alone every array of more than some pages would be given back.
    return mallopt is not None and bool(
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, _MOST_KEPT)
    )


def return_freed_memory() -> None:
    """Give freed memory back to the system; a worker lives for hours and would keep the most that it ever used."""
    trim = _of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def says_out_of_memory(message: str) -> bool:
    """Tell whether the message of an error means that memory could not be had, of a GPU or of the machine.

    Only some of these errors have a class of their own: neither torch's on a CPU nor those of CUDA's libraries.

    Args:
        message: Message of the error.
    """
    return any(words in message for words in _NO_MEMORY)


def peak_rss_bytes() -> int:
    """Return the largest resident memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _of_c_library(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None)
