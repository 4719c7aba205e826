"""The log of who worked on what and when. What it leaves out is the time that workers had nothing to do."""

import dataclasses
import time
from collections.abc import Callable

from astro_dist.run_directory.journal import Worked

__all__ = ["WorkLog"]


@dataclasses.dataclass
class _Stretch:
    """Calls of one worker on one unit, which follow each other.

    Attributes:
        unit: Name of the unit.
        begin: Time at which the first call was given out, in seconds since 1970.
        end: Time at which the last call ended, in seconds since 1970.
        busy_s: Time of the calls without the pauses between them, in seconds.
        since: Time at which the call that goes on was given out, in seconds since 1970; None where none goes on.
    """

    unit: str
    begin: float
    end: float
    busy_s: float
    since: float | None


class WorkLog:
    """Notes each stretch of a worker on a unit when it is over, so that thousands of calls make few lines."""

    def __init__(self, note: Callable[..., None]) -> None:
        """Begin an empty log.

        Args:
            note: Function that takes the name of an event and its details, and writes them to the journal.
        """
        self._note = note
        self._open: dict[int, _Stretch] = {}

    def began(self, worker: int, unit: str) -> None:
        """Take note that a worker was given a call.

        Args:
            worker: Number of the worker.
            unit: Name of the unit that the call belongs to.
        """
        now, stretch = time.time(), self._open.get(worker)
        if stretch is not None and stretch.unit == unit:
            stretch.since = now
            return
        self._write(worker)
        self._open[worker] = _Stretch(unit, now, now, 0.0, now)

    def ended(self, worker: int) -> None:
        """Take note that the call of a worker ended, in whatever way.

        Args:
            worker: Number of the worker.
        """
        stretch = self._open.get(worker)
        if stretch is None or stretch.since is None:
            return
        stretch.end = time.time()
        stretch.busy_s += stretch.end - stretch.since
        stretch.since = None

    def close(self) -> None:
        """Write what is not written yet."""
        for worker in list(self._open):
            self.ended(worker)
            self._write(worker)

    def _write(self, worker: int) -> None:
        stretch = self._open.pop(worker, None)
        if stretch is not None:
            self._note(
                Worked.NAME, worker=worker, unit=stretch.unit, begin=round(stretch.begin, 3),
                end=round(stretch.end, 3), busy_s=round(stretch.busy_s, 3),
            )  # fmt: skip
