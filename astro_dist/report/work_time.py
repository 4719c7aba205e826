"""Where the time of the workers went: the phases of all their work, and who was at work when."""

import dataclasses
from collections.abc import Mapping, Sequence

from astro_dist.console import in_words
from astro_dist.run_directory.journal import Event, Joined, Opened, Passed, Worked
from astro_dist.run_directory.unit_record import UnitRecord
from astro_dist.schedule.names import EMBED, copy_index, is_block_unit, is_evaluation_unit
from astro_dist.schedule.unit_words import UnitWords
from astro_dist.wording import percent

__all__ = ["Part", "Stretch", "Timeline", "WorkerRow", "phase_parts", "timeline"]

_PARTS: dict[str, tuple[str, ...]] = {
    "forward passes": ("forward", "pass_on"),
    "backward passes": ("backward",),
    "Hessians": ("hessian", "factor"),
    "choosing β and widths": ("beta", "widths"),
    "regularizing": ("regularize", "compensate"),
    "rounding": ("grid", "gptq", "refine"),
    "correcting": ("reconstruct",),
    "tuning scales": ("tune",),
    "evaluating": ("evaluate",),
    "reading and writing": ("read", "write"),
}
"""The parts that the page shows, and the phases in records that belong to each."""
_OTHER = "other"
_KINDS = ("embedding and copying", "weighing tokens, smoothing", "quantizing blocks", "evaluating")
"""Kinds of work in the timeline."""
_MOST_ROWS = 16
"""Number of workers that the timeline shows; of more it shows those that were idle longest."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the time of all workers.

    Attributes:
        number: Number of its colour.
        name: What was done.
        start: Share of the time before it.
        share: Share of the time.
        figures: Time and share, in words.
    """

    number: int
    name: str
    start: float
    share: float
    figures: str


def phase_parts(records: Sequence[UnitRecord], events: Sequence[Event]) -> tuple[Part, ...]:
    """Add up the time of all workers by part; it is empty where nothing was measured yet.

    Args:
        records: Every record of the run.
        events: Every event of the journal.
    """
    seconds: dict[str, float] = {"pass_on": sum(event.seconds for event in events if isinstance(event, Passed))}
    for record in records:
        for phase, spent in record.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    part_of = {phase: part for part, phases in _PARTS.items() for phase in phases}
    spent_on = dict.fromkeys((*_PARTS, _OTHER), 0.0)
    for phase, spent in seconds.items():
        spent_on[part_of.get(phase, _OTHER)] += spent
    total, before = sum(spent_on.values()), 0.0
    parts = []
    for number, (name, spent) in enumerate(spent_on.items()):
        if spent > 0:
            share = spent / total
            parts.append(Part(number, name, before, share, f"{in_words(spent)}, {percent(share)}"))
            before += share
    return tuple(parts)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """A worker was at one unit. Start and length are shares of the session.

    Attributes:
        kind: Number of the kind of work.
        start: Time before it.
        length: Time from its begin to its end.
        busy: Share of that time at which the worker had a call.
        title: Unit and times, in words.
    """

    kind: int
    start: float
    length: float
    busy: float
    title: str


@dataclasses.dataclass(frozen=True)
class WorkerRow:
    """What one worker did.

    Attributes:
        worker: Number of the worker.
        figures: Share of the time since it was up at which it was busy, and its idle time, in words.
        stretches: Stretches of work.
    """

    worker: int
    figures: str
    stretches: tuple[Stretch, ...]


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What the workers did in one session.

    Attributes:
        rows: Rows of workers.
        kinds: Names of the kinds of work that occur, by number.
        length: Length of the session up to the last work, in words.
        busy: Share of the time of all workers at which they were busy, in words.
        left_out: Number of workers that have no row.
    """

    rows: tuple[WorkerRow, ...]
    kinds: Mapping[int, str]
    length: str
    busy: str
    left_out: int


def timeline(session: Sequence[Event], words: UnitWords) -> Timeline | None:
    """Make the timeline of a session.

    Args:
        session: Events of the session.
        words: What people are told instead of the names of units.

    Returns:
        The timeline; None where the journal does not say who was at work, as those up to version 0.7.0.
    """
    work: dict[int, list[Worked]] = {}
    for event in session:
        if isinstance(event, Worked):
            work.setdefault(event.worker, []).append(event)
    if not work:
        return None
    begin = next((event.time for event in session if isinstance(event, Opened)), session[0].time)
    end = max(event.end for events in work.values() for event in events)
    length = max(end - begin, 1e-3)
    joined = {event.worker: event.time for event in reversed(session) if isinstance(event, Joined)}
    present = {worker: max(end - joined.get(worker, begin), 1e-3) for worker in work}
    busy = {worker: sum(event.busy_s for event in events) for worker, events in work.items()}
    idle = {worker: max(present[worker] - busy[worker], 0.0) for worker in work}
    shown = sorted(sorted(work, key=lambda worker: -idle[worker])[:_MOST_ROWS])
    rows = [
        WorkerRow(
            worker,
            f"busy {percent(min(busy[worker] / present[worker], 1.0))}, idle {in_words(idle[worker])}",
            tuple(_stretch(event, begin, length, words) for event in work[worker]),
        )
        for worker in shown
    ]
    kinds = sorted({stretch.kind for row in rows for stretch in row.stretches})
    return Timeline(
        rows=tuple(rows),
        kinds={kind: _KINDS[kind] for kind in kinds},
        length=in_words(length),
        busy=percent(min(sum(busy.values()) / sum(present.values()), 1.0)),
        left_out=len(work) - len(shown),
    )


def _stretch(event: Worked, begin: float, length: float, words: UnitWords) -> Stretch:
    took = max(event.end - event.begin, 1e-3)
    after = in_words(event.begin - begin)
    return Stretch(
        kind=_kind(event.unit),
        start=(event.begin - begin) / length,
        length=took / length,
        busy=min(event.busy_s / took, 1.0),
        title=f"{words.unit(event.unit)}: {in_words(event.busy_s)} of work, from {after} after the start",
    )


def _kind(unit: str) -> int:
    """The number of the kind of work that a unit is."""
    if unit == EMBED or copy_index(unit) is not None:
        return 0
    if is_block_unit(unit):
        return 2
    return 3 if is_evaluation_unit(unit) else 1
