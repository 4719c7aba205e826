"""The schedule of a run that measures something first, token weights or channels, and then goes on in its mode."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

from astro_dist.schedule.calls import Call, Result
from astro_dist.schedule.names import EMBED, ORIGINAL
from astro_dist.schedule.schedule import Present, Schedule, StartingPoint
from astro_dist.schedule.spent import Spent

__all__ = ["Waves", "WeighedFirst"]


class Waves(Schedule, Protocol):
    """Passes the calibration chunks through the source's blocks, and keeps the inputs of all of them."""

    @property
    def inputs(self) -> dict[int, set[str]]:
        """Return the chunks whose hidden states are there as input of each block."""


class WeighedFirst:
    """Holds two schedules, of which the second begins where the first ends.

    The blocks' inputs that the waves leave are the very ones that the run's mode begins with.

    Attributes:
        units: Names of all units of both.
        finished: Names of the units that are finished.
    """

    def __init__(
        self,
        waves: Waves,
        begin: Callable[[StartingPoint], Schedule],
        start: StartingPoint,
        embedded: Present,
    ) -> None:
        """Begin with the waves.

        Args:
            waves: The schedule that measures.
            begin: Makes the schedule that follows.
            start: What of the run is done already.
            embedded: What is there in each stream once the tokens are embedded.
        """
        self._waves, self._begin, self._start, self._embedded = waves, begin, start, embedded
        self._main = begin(start)
        self._giver: dict[int, Schedule] = {}  # of what each worker does
        self.units = [*(unit for unit in waves.units if unit != EMBED), *self._main.units]
        self.finished = (self._main.finished - {EMBED}) | waves.finished
        if waves.complete:
            self._turn_to_main()

    @property
    def complete(self) -> bool:
        """Tell whether every unit is finished."""
        return self._waves.complete and self._main.complete

    def next_call(self, worker: int, idle: int = 0) -> Call | None:
        """Decide what a free worker does now; see `Schedule`."""
        call = self._now.next_call(worker, idle)
        if call is not None:
            self._giver[worker] = self._now
        return call

    def done(self, worker: int, call: Call, result: Result) -> list[Spent]:
        """Take note that a call returned; see `Schedule`."""
        weighed = self._waves.complete
        giver = self._giver.pop(worker)
        spent = giver.done(worker, call, result)
        self.finished |= giver.finished
        if self._waves.complete and not weighed:
            self._turn_to_main()
        return spent

    def failed(self, worker: int, call: Call) -> None:
        """Take note that a call came to nothing; see `Schedule`."""
        self._giver.pop(worker).failed(worker, call)

    def holds(self, worker: int) -> bool:
        """Tell whether a worker waits with a block in its hands; see `Schedule`."""
        return self._now.holds(worker)

    @property
    def _now(self) -> Schedule:
        return self._main if self._waves.complete else self._waves

    def _turn_to_main(self) -> None:
        """Begin the run's mode with what the waves left."""
        made = [{ORIGINAL: self._waves.inputs}, *([self._embedded] if EMBED in self._waves.finished else [])]
        present: dict[str, dict[int, set[str]]] = {}
        for there in (self._start.present, *made):
            for stream, blocks in there.items():
                for block, chunks in blocks.items():
                    present.setdefault(stream, {}).setdefault(block, set()).update(chunks)
        finished = set(self._start.finished) | self._waves.finished
        self._main = self._begin(dataclasses.replace(self._start, finished=finished, present=present))
        self.finished |= self._main.finished
