"""What becomes of memory that was freed: kept for the next array while a block is worked on, then given back.

The system clears every page that it hands out, page by page. Fresh pages for each of a forward's arrays take a CPU a
tenth of its time. These calls are glibc's; with another C library they do nothing.
"""

import ctypes
import resource
from collections.abc import Callable

import torch
import transformers

__all__ = ["configure_process", "keep_freed_memory", "peak_rss_bytes", "return_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 << 20
"""An array above it, such as a wide layer's Hessian, is given back as soon as it is freed. The most that every glibc
takes."""
_MOST_KEPT = 128 << 20
"""Free memory behind all that is in use."""


def keep_freed_memory() -> bool:
    """Let this process use freed memory again, instead of asking for new pages. Whether the C library does that."""
    mallopt = _of_c_library("mallopt")
    # Only together: after the second alone every array of more than some pages would be given back.
    return mallopt is not None and bool(
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, _MOST_KEPT)
    )


def return_freed_memory() -> None:
    """Give freed memory back to the system; a worker lives for hours and would keep its largest ever."""
    trim = _of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def _of_c_library(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None)


def configure_process(threads: int) -> None:
    """Settings of the whole process that the arithmetic depends on: threads, and exact float32 products."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def peak_rss_bytes() -> int:
    """Largest resident memory this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
