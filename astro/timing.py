"""Wall-clock time by phase."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__all__ = ["add_seconds", "timed"]


def add_seconds(total: dict[str, float], more: Mapping[str, float]) -> None:
    """Add times by phase to those of `total`, in place."""
    for phase, seconds in more.items():
        total[phase] = total.get(phase, 0.0) + seconds


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time that the body takes to a phase of `seconds`."""
    start = time.perf_counter()
    yield
    add_seconds(seconds, {phase: time.perf_counter() - start})
