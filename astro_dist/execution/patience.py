"""The driver's patience: how long it waits before it does something about a standstill."""

import time

__all__ = ["Patience"]

_STALL_S = 30.0
"""Seconds between two looks after which the driver itself must have hung."""
_USUAL_START_S = 90.0
"""Seconds within which a worker is up even on a machine with few cores, where Ray and torch load slowly. Only after
that a person is told that there is none."""
_REPORT_S = 30.0
"""Seconds after which a person is told again."""
_STUCK_S = 120.0
"""Seconds without a call, although workers are free, after which the state of the run is read again."""


class Patience:
    """Measures since when the driver has had no worker, made no call, or not looked at all.

    Attributes:
        stuck_s: Seconds without a call, although workers are free, after which the schedule counts as stuck.
    """

    def __init__(self, worker_timeout_s: float) -> None:
        """Start the clock.

        Args:
            worker_timeout_s: Seconds without any worker after which the run fails.
        """
        self._worker_timeout_s = worker_timeout_s
        self.stuck_s = _STUCK_S
        self._last_worker = self._last_look = self._last_call = time.monotonic()
        self._next_report = self._last_worker + _USUAL_START_S
        self._not_before = 0.0

    def postpone(self, seconds: float) -> None:
        """Let no call be given out for some time.

        Args:
            seconds: Length of that time.
        """
        self._not_before = max(self._not_before, time.monotonic() + seconds)

    @property
    def postpones(self) -> bool:
        """Tell whether no call is to be given out yet."""
        return time.monotonic() < self._not_before

    def saw_call(self) -> None:
        """Take note that a call was given out or has returned, or that none can be expected now."""
        self._last_call = time.monotonic()

    def saw_worker(self) -> None:
        """Take note that a worker is up."""
        self._last_worker = time.monotonic()
        self._next_report = self._last_worker + _USUAL_START_S

    def stood_still(self) -> bool:
        """Tell whether the driver itself hung since the last look, perhaps on a file system that hung for all."""
        now = time.monotonic()
        before, self._last_look = self._last_look, now
        return now - before > _STALL_S

    def waited_s(self) -> float:
        """Return for how many seconds there has been no worker."""
        return time.monotonic() - self._last_worker

    def worker_wait_s(self) -> float:
        """Return for how many more seconds a worker is waited for; negative once it has taken too long."""
        return self._worker_timeout_s - self.waited_s()

    def is_report_due(self) -> bool:
        """Tell whether a person is to be told, again, what is waited for. It counts as done then."""
        now = time.monotonic()
        if now <= self._next_report:
            return False
        self._next_report = now + _REPORT_S
        return True

    @property
    def is_stuck(self) -> bool:
        """Tell whether no call was made for too long."""
        return time.monotonic() - self._last_call > self.stuck_s
