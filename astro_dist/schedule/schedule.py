"""What a schedule is, what it begins with, and how it serves several free workers.

A schedule is pure: it takes note of what was finished and decides what a free worker does next. It reads no files and
no clock, so it can be simulated.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from astro_dist.schedule.calls import Call, Result
from astro_dist.schedule.spent import Spent

__all__ = ["NOTHING_DONE", "Present", "RunShape", "Schedule", "StartingPoint", "assign"]

Present = Mapping[str, Mapping[int, Collection[str]]]
"""The names of the chunks whose hidden states are there as input of a block, by stream and index of the block."""


@dataclasses.dataclass(frozen=True)
class RunShape:
    """Says how large a run is, which fixes its units.

    Attributes:
        num_blocks: Number of blocks of the model.
        num_copies: Number of units that copy tensors.
        chunks: Names of the chunks in the order in which they travel; see `is_held_out`.
    """

    num_blocks: int
    num_copies: int
    chunks: Sequence[str]


@dataclasses.dataclass(frozen=True)
class StartingPoint:
    """Says how much of a run is done when its schedule begins.

    Attributes:
        finished: Names of the units that are finished.
        present: Chunks that are there as input of each block.
        written: Names of the finished units whose files are still there; None where all of them are. Mode `sequential`
            makes no use of it.
    """

    finished: Collection[str] = ()
    present: Present = dataclasses.field(default_factory=dict)
    written: Collection[str] | None = None

    def chunks_before(self, stream: str, num_blocks: int) -> list[set[str]]:
        """Return the chunks of a stream that are there as input of each block, and behind the last one.

        Args:
            stream: Name of the stream.
            num_blocks: Number of blocks of the model.
        """
        by_block = self.present.get(stream, {})
        return [set(by_block.get(block, ())) for block in range(num_blocks + 1)]

    def chunks_behind(self, stream: str, num_blocks: int) -> list[set[str]]:
        """Return the chunks of a stream that each block has left behind.

        Args:
            stream: Name of the stream.
            num_blocks: Number of blocks of the model.
        """
        return self.chunks_before(stream, num_blocks)[1:]


NOTHING_DONE = StartingPoint()
"""The beginning of a new run."""


class Schedule(Protocol):
    """Holds the state of a run, and decides what each worker does next.

    Attributes:
        finished: Names of the units that are finished.
    """

    finished: set[str]

    @property
    def complete(self) -> bool:
        """Tell whether every unit is finished."""

    @property
    def units(self) -> list[str]:
        """Return the name of every unit."""

    def next_call(self, worker: int, idle: int = 0) -> Call | None:
        """Decide what a free worker does now.

        Args:
            worker: Number of the worker.
            idle: Number of other workers that have nothing to do.

        Returns:
            Call for the worker. The schedule counts it as begun. None where the worker has to wait for other workers.
        """

    def done(self, worker: int, call: Call, result: Result) -> list[Spent]:
        """Take note that a call returned.

        Args:
            worker: Number of the worker.
            call: Call that returned.
            result: Result of the call.

        Returns:
            Files that are not needed any more.
        """

    def failed(self, worker: int, call: Call) -> None:
        """Take note that a call came to nothing, and that the worker has lost the block that it had open.

        Args:
            worker: Number of the worker.
            call: Call that came to nothing.
        """

    def holds(self, worker: int) -> bool:
        """Tell whether a worker goes on with the block that it has open, or waits for chunks on their way to it.

        Workers without an open block are alike: where one of them gets no call, none of the others does.

        Args:
            worker: Number of the worker.
        """


def assign(schedule: Schedule, workers: Iterable[int]) -> Iterator[tuple[int, Call]]:
    """Decide what each of some free workers does now.

    Args:
        schedule: Schedule of the run.
        workers: Numbers of the free workers.

    Yields:
        Number of a worker, and its call. Workers that have to wait are left out.
    """
    idle = 0
    for worker in sorted(workers, key=lambda worker: (schedule.holds(worker), worker)):
        holds = schedule.holds(worker)
        if idle and not holds:
            idle += 1
            continue
        call = schedule.next_call(worker, idle)
        if call is not None:
            yield worker, call
        elif not holds:
            idle += 1
