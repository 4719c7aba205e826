"""How long the driver waits for what, before it does something about it."""

import time

__all__ = ["Patience"]

_STALL_S = 30.0
_TELL_S = 30.0
_STUCK_S = 120.0
"""Without anything to hand out although workers are free: the state of the run is read anew."""


class Patience:
    """The driver's clock: since when it has had no worker, made no call, or not looked around at all.

    Attributes:
        stuck_s: Seconds without a call, although workers are free, after which the schedule is taken to be stuck.
    """

    def __init__(self, worker_timeout_s: float) -> None:
        """Start the clock.

        Args:
            worker_timeout_s: Seconds without any worker after which the run fails.
        """
        self._worker_timeout_s = worker_timeout_s
        self.stuck_s = _STUCK_S
        self._last_worker = self._last_told = self._last_look = self._last_call = time.monotonic()
        self._not_before = 0.0

    def postpone(self, seconds: float) -> None:
        """Let nothing be tried again for some time."""
        self._not_before = max(self._not_before, time.monotonic() + seconds)

    @property
    def postpones(self) -> bool:
        """Whether nothing is to be handed out yet."""
        return time.monotonic() < self._not_before

    def saw_call(self) -> None:
        """Take note that a call was made, has come back, or cannot be expected now."""
        self._last_call = time.monotonic()

    def saw_worker(self) -> None:
        """Take note that a worker is up."""
        self._last_worker = self._last_told = time.monotonic()

    def stood_still(self) -> bool:
        """Whether the driver itself hung since it was last asked, perhaps on a file system that hung for all."""
        now = time.monotonic()
        before, self._last_look = self._last_look, now
        return now - before > _STALL_S

    def worker_wait_s(self) -> float:
        """Seconds for which a worker is still waited for; less than 0 once it has taken too long."""
        return self._worker_timeout_s - (time.monotonic() - self._last_worker)

    def shall_tell(self) -> bool:
        """Whether it is time to say, again, what is waited for."""
        now = time.monotonic()
        if now - self._last_told <= _TELL_S:
            return False
        self._last_told = now
        return True

    @property
    def is_stuck(self) -> bool:
        """Whether no call was made for too long."""
        return time.monotonic() - self._last_call > self.stuck_s
