"""What becomes of memory that was freed: kept for the next array while a block is worked on, then given back.

The system clears every page that it hands out, page by page. Fresh pages for each of a forward's arrays take a CPU an
eighth of its time. Both calls are glibc's; elsewhere they do nothing.
"""

import ctypes
from collections.abc import Callable

__all__ = ["keep_freed_memory", "return_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 64 << 20
"""An array above it, such as a wide layer's Hessian, is given back as soon as it is freed."""
_MOST_KEPT = 256 << 20


def keep_freed_memory() -> None:
    """Let this process use freed memory again, instead of asking for new pages."""
    mallopt = _of_c_library("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, _MOST_KEPT)


def return_freed_memory() -> None:
    """Give freed memory back to the system; a worker lives for hours and would keep its largest ever."""
    trim = _of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def _of_c_library(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None)
