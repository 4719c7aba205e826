"""Wall-clock seconds, added up by phase of the work."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__all__ = ["add_seconds", "timed"]


def add_seconds(total: dict[str, float], more: Mapping[str, float]) -> None:
    """Add the seconds of each phase to those of a total, in place.

    Args:
        total: Seconds by phase; it is changed.
        more: Seconds by phase that are added.
    """
    for phase, seconds in more.items():
        total[phase] = total.get(phase, 0.0) + seconds


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time that the body of a `with` statement takes to the seconds of a phase.

    Args:
        seconds: Seconds by phase; it is changed.
        phase: Name of the phase.
    """
    start = time.perf_counter()
    yield
    add_seconds(seconds, {phase: time.perf_counter() - start})
