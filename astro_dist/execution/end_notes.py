"""The journal is told when the session will end, so that `status` shows what the display shows."""

import time
from collections.abc import Callable

from astro_dist.run_directory.journal import Foretold

__all__ = ["EndNotes"]

_SHARE = 0.02
"""How far the end must move, as a share of the time that is left, before that is noted."""
_LEAST_S = 2.0
"""How far the end must move in any case, in seconds: nobody sees less."""


class EndNotes:
    """Notes the time that is left when the end has moved, so that many forecasts that agree make one line."""

    def __init__(self, note: Callable[..., None]) -> None:
        """Begin with nothing noted.

        Args:
            note: Function that appends an event with its details to the journal.
        """
        self._note = note
        self._end: float | None = None

    def saw(self, seconds_left: float | None) -> None:
        """Take what is foretold at this moment.

        Args:
            seconds_left: Time until the session's end, in seconds; None while it is not known.
        """
        if seconds_left is None:
            return
        end = time.time() + seconds_left
        if self._end is None or abs(end - self._end) > max(_LEAST_S, _SHARE * seconds_left):
            self._end = end
            self._note(Foretold.NAME, seconds_left=round(seconds_left, 1))
