"""Wall-clock seconds, added up by phase of the work.

A GPU works on what it was asked for while its host goes on. So a clock that is read without waiting for it would give
the time of a kernel to whatever the host waits for next. Phases wait for the device where they begin and where they
end, and nowhere else. What happens many times within a phase is timed by a `Stopwatch`, which does not wait while it
runs.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it takes seconds to load, which those who only add up need not wait for
    import torch

__all__ = ["Stopwatch", "add_seconds", "clock_s", "host_clock_s", "timed"]


def add_seconds(total: dict[str, float], more: Mapping[str, float]) -> None:
    """Add the seconds of each phase to those of a total, in place.

    Args:
        total: Seconds by phase; it is changed.
        more: Seconds by phase that are added.
    """
    for phase, seconds in more.items():
        total[phase] = total.get(phase, 0.0) + seconds


def clock_s(device: "torch.device") -> float:
    """Return the time on a clock with an arbitrary zero, in seconds, once a device has done all that it was asked for.

    Args:
        device: The device. A CPU is never waited for.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def host_clock_s() -> float:
    """Return the time on the same clock, in seconds, without waiting for a device: where what counts is on disk."""
    return time.perf_counter()


@contextmanager
def timed(seconds: dict[str, float], phase: str, device: "torch.device") -> Iterator[None]:
    """Add the time that the body of a `with` statement takes, and the device for it, to the seconds of a phase.

    Args:
        seconds: Seconds by phase; it is changed.
        phase: Name of the phase.
        device: Device that is waited for before and after the body.
    """
    start = clock_s(device)
    yield
    add_seconds(seconds, {phase: clock_s(device) - start})


class Stopwatch:
    """Adds up the time of many short spans of work on a device, without waiting for the device in between."""

    def __init__(self, device: "torch.device") -> None:
        """Begin with no time.

        Args:
            device: The device. On a GPU the time is its own, from where it begins a span to where it ends it.
        """
        self._device = device
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the body of a `with` statement."""
        if self._device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        import torch

        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self._device)
        begin.record(stream)
        yield
        end.record(stream)
        self._spans.append((begin, end))

    def read_s(self) -> float:
        """Return the seconds of all spans so far, once the device has come to the end of the last one."""
        spans, self._spans = self._spans, []
        for begin, end in spans:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        return self._seconds
