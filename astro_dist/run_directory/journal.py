"""The journal of a run, which says what happened when. Each line is a JSON object; lines are only ever appended."""

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from astro.errors import StorageError
from astro_dist.run_directory.plain_record import PlainRecord

__all__ = [
    "Began",
    "Damaged",
    "Event",
    "Failed",
    "Finished",
    "Foretold",
    "Joined",
    "Journal",
    "Opened",
    "Passed",
    "PublishFailed",
    "Published",
    "Started",
    "UploadFailed",
    "Uploaded",
    "Worked",
    "last_of_each_unit",
    "last_session",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event(PlainRecord):
    """Says that something happened. Each kind of event that is read back is a subclass, and `NAME` its name.

    A line of the journal may say more than the event's fields; that is for people.

    Attributes:
        time: Time at which it happened, in seconds since 1970.
    """

    NAME: ClassVar[str]
    time: float

    def to_json(self) -> dict[str, Any]:
        """Return the event as the JSON object of its line."""
        fields = super().to_json()
        return {"time": fields.pop("time"), "event": self.NAME, **fields}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened(Event):
    """A driver began to work on the run, which begins a session."""

    NAME: ClassVar[str] = "opened"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started(Event):
    """A session knows what there is to do.

    Attributes:
        units: Number of all units of the run.
        blocks: Number of blocks to quantize, over all rounds.
    """

    NAME: ClassVar[str] = "started"
    units: int
    blocks: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined(Event):
    """A worker is up.

    Attributes:
        worker: Number of the worker.
    """

    NAME: ClassVar[str] = "joined"
    worker: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Began(Event):
    """A worker began a unit.

    Attributes:
        unit: Name of the unit.
        worker: Number of the worker.
    """

    NAME: ClassVar[str] = "began"
    unit: str
    worker: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """A worker finished a unit.

    Attributes:
        unit: Name of the unit.
    """

    NAME: ClassVar[str] = "finished"
    unit: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foretold(Event):
    """The display foretells another end of the session than before.

    Attributes:
        seconds_left: Time until that end, in seconds.
    """

    NAME: ClassVar[str] = "foretold"
    seconds_left: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """A call on a worker came to nothing.

    Attributes:
        unit: Name of the unit that the call belongs to.
        method: Description of what the worker was to do.
        worker: Number of the worker.
        kind: Way in which the call failed; see `Failure`.
        cause: Reason, in one line.
    """

    NAME: ClassVar[str] = "failed"
    unit: str
    method: str
    worker: int
    kind: str
    cause: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Damaged(Event):
    """A finished unit was found damaged, and is done again.

    Attributes:
        unit: Name of the unit.
        reason: Name of the file, and what is wrong with it.
    """

    NAME: ClassVar[str] = "damaged"
    unit: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passed(Event):
    """A chunk passed through a block outside the unit of that block.

    Attributes:
        seconds: Time that it took, in seconds.
    """

    NAME: ClassVar[str] = "passed"
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Worked(Event):
    """A worker did something of a unit, and then turned to another unit or to nothing.

    Attributes:
        worker: Number of the worker.
        unit: Name of the unit.
        begin: Time at which the first call was given out, in seconds since 1970.
        end: Time at which the last call ended, in seconds since 1970.
        busy_s: Time of the calls without the pauses between them, in seconds.
    """

    NAME: ClassVar[str] = "worked"
    worker: int
    unit: str
    begin: float
    end: float
    busy_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uploaded(Event):
    """A file of the model is at the Hub."""

    NAME: ClassVar[str] = "uploaded"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UploadFailed(Event):
    """A unit's files could not be uploaded while the run went on.

    Attributes:
        unit: Name of the unit.
        cause: Reason, in words.
    """

    NAME: ClassVar[str] = "upload_failed"
    unit: str
    cause: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published(Event):
    """The model was published."""

    NAME: ClassVar[str] = "published"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishFailed(Event):
    """The finished model could not be published.

    Attributes:
        cause: Reason, in words.
    """

    NAME: ClassVar[str] = "publish_failed"
    cause: str


_BY_NAME: dict[str, type[Event]] = {kind.NAME: kind for kind in Event.__subclasses__()}

Kind = TypeVar("Kind", bound=Event)
UnitEvent = TypeVar("UnitEvent", Damaged, Failed)


@dataclasses.dataclass(frozen=True)
class Journal:
    """Appends lines to the file of a journal, and reads events from it.

    Attributes:
        path: Path of the file, which need not be there yet.
    """

    path: Path

    def note(self, event: str, **details: Any) -> None:
        """Append one line.

        Args:
            event: Name of the event.
            details: Further content of the line, as JSON types.

        Raises:
            StorageError: The file system refused.
        """
        line = json.dumps({"time": round(time.time(), 3), "event": event} | details)
        try:
            with self.path.open("ab+") as journal:
                end = journal.seek(0, os.SEEK_END)
                journal.seek(max(end - 1, 0))
                # After a line that was cut short, begin a new one.
                begin = b"" if journal.read(1) in (b"", b"\n") else b"\n"
                journal.write(begin + line.encode() + b"\n")
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error}. What is finished is kept") from error

    def events(self) -> list[Event]:
        """Return the events of all kinds that are known here, the oldest first."""
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        return [event for event in map(_parse, text.splitlines()) if event is not None]

    def of_kind(self, kind: type[Kind]) -> list[Kind]:
        """Return the events of one kind, the oldest first.

        Args:
            kind: Class of the events.
        """
        return [event for event in self.events() if isinstance(event, kind)]


def last_session(events: Sequence[Event]) -> Sequence[Event]:
    """Return the events of the last session; none where no session was begun.

    Args:
        events: Events, the oldest first.
    """
    opened = [index for index, event in enumerate(events) if isinstance(event, Opened)]
    return events[opened[-1] :] if opened else ()


def last_of_each_unit(events: Iterable[UnitEvent]) -> tuple[UnitEvent, ...]:
    """Return the newest event of every unit. What is noted of a unit again in every session counts once.

    Args:
        events: Events, the oldest first.

    Returns:
        One event for each unit, in the order in which the units first occur.
    """
    return tuple({event.unit: event for event in events}.values())


def _parse(line: str) -> Event | None:
    """The event of a line; None if its kind is unknown, or if a killed process or a full disk cut the line short."""
    try:
        content = json.loads(line)
        kind = _BY_NAME.get(content["event"])
        return kind.from_json(content) if kind else None
    except (ValueError, KeyError, TypeError):
        return None
