"""Say how far something is that may take long, so that nobody takes it for a hang."""

import logging
import time

__all__ = ["LongWait"]

_log = logging.getLogger("astro_dist")

_EVERY_S = 10.0
"""Seconds between two lines; what takes less than that says nothing."""


class LongWait:
    """Logs how much of something is done: nothing in the first ten seconds, then a line every ten seconds."""

    def __init__(self, what: str, total: float | None, unit: str) -> None:
        """Begin to wait.

        Args:
            what: Phrase that says what is waited for, such as "calibration text: tokenized".
            total: Amount of the whole, in units; None where it is not known.
            unit: Name of the unit, such as "million characters".
        """
        self._what, self._total, self._unit = what, total, unit
        self._said = time.monotonic()
        self._done = 0.0

    def advanced(self, more: float) -> None:
        """Log a line if the last one is long enough ago, where it is known how much has been done since the last call.

        Args:
            more: Amount that was done since then, in units.
        """
        self.reached(self._done + more)

    def reached(self, done: float) -> None:
        """Log a line if the last one is long enough ago.

        Args:
            done: Amount that is done, in units.
        """
        self._done = done
        now = time.monotonic()
        if now - self._said >= _EVERY_S:
            self._said = now
            of_total = "" if self._total is None else f" of {_amount(self._total)}"
            _log.info("%s %s%s %s", self._what, _amount(done), of_total, self._unit)


def _amount(number: float) -> str:
    """Write a whole number of things as it is, and an amount with one decimal place."""
    return str(number) if isinstance(number, int) else f"{number:.1f}"
