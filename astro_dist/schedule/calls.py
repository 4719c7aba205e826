"""Who does what next. Pure: it is told what was finished and answers what a free worker shall do.

A *stream* is the hidden states of every chunk on their way through one model: `original` through the source,
`round-0`, `round-1`, ... through what that round wrote. Round 0 calibrates on the stream `original`, round r on the
stream `round-(r−1)`; behind the last round, only the held-out chunks travel, for the perplexity of the result.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol

__all__ = ["Call", "Present", "Schedule", "Spent", "assign", "copy_calls"]

Present = Mapping[str, Mapping[int, Collection[str]]]
"""Chunks that are there as input of each block, by stream."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One method call on a worker.

    Attributes:
        method: of the worker.
        args: its arguments.
        unit: name of the unit it belongs to.
    """

    method: str
    args: tuple[int | str, ...]
    unit: str


@dataclasses.dataclass(frozen=True)
class Spent:
    """Files that no unfinished unit needs any more. Only the driver deletes: a worker that was given up for dead may
    still be at work on what another has taken over.

    Attributes:
        kind: `inputs` of a block in a `stream`; `shard` of a block in the round `number`; `shares` of a block's group
            `number`; `parts`, all that workers handed each other for a block's solve in the round `number`.
        block: index.
        stream: of the inputs.
        number: round or group.
    """

    kind: Literal["inputs", "shard", "shares", "parts"]
    block: int
    stream: str = ""
    number: int = 0


class Schedule(Protocol):
    """State of a run."""

    finished: set[str]

    @property
    def complete(self) -> bool:
        """Whether every unit is finished."""

    @property
    def units(self) -> list[str]:
        """Every unit."""

    def next_call(self, worker: int, idle: int = 0) -> Call | None:
        """What a free worker shall do now; None where it must wait for another. `idle` others have nothing to do."""

    def done(self, worker: int, call: Call, result: Any) -> list[Spent]:
        """Take note that a call returned; what is not needed any more."""

    def failed(self, worker: int, call: Call) -> None:
        """Take note that a call came to nothing, and that the worker has lost what it held."""

    def holds(self, worker: int) -> bool:
        """Whether a worker has something in hand that only it can go on with. What one worker with empty hands cannot
        get, no other such worker can.
        """


def assign(schedule: Schedule, workers: Iterable[int]) -> Iterator[tuple[int, Call]]:
    """What each of some free workers shall do now; those that must wait are left out."""
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


def copy_calls(units: Iterable[str]) -> list[Call]:
    """The calls of those units that copy tensors."""
    copies = [unit for unit in units if unit.startswith("copy-")]
    return [Call("copy", (int(unit.removeprefix("copy-")),), unit) for unit in copies]
