"""The journal of a run: what happened when, one JSON object a line, only ever appended to."""

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from astro.errors import StorageError

__all__ = [
    "Began",
    "Damaged",
    "Event",
    "Failed",
    "Finished",
    "Joined",
    "Journal",
    "Opened",
    "Passed",
    "PublishFailed",
    "Published",
    "Started",
    "UploadFailed",
    "Uploaded",
    "last_of_each_unit",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened and is read back. What else its line says is for people.

    Attributes:
        time: Seconds since 1970.
    """

    NAME: ClassVar[str]
    time: float

    def to_json(self) -> dict[str, Any]:
        """The event as the JSON object of its line."""
        fields = dataclasses.asdict(self)
        return {"time": fields.pop("time"), "event": self.NAME, **fields}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` gave.

        Args:
            content: JSON object of the line, with every field.
        """
        return cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened(Event):
    """A driver began to work on the run: a session."""

    NAME: ClassVar[str] = "opened"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started(Event):
    """A session knows what there is to do.

    Attributes:
        units: Number of all units of the run.
        blocks: Number of blocks over all rounds.
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
class Failed(Event):
    """A call on a worker came to nothing.

    Attributes:
        unit: Name of the unit that the call belongs to.
        method: What the worker was to do.
        worker: Number of the worker.
        kind: How the call failed.
        cause: Why, in one line.
    """

    NAME: ClassVar[str] = "failed"
    unit: str
    method: str
    worker: int
    kind: str
    cause: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Damaged(Event):
    """A finished unit was found damaged, to be redone.

    Attributes:
        unit: Name of the unit.
        reason: What is wrong, and with which file.
    """

    NAME: ClassVar[str] = "damaged"
    unit: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passed(Event):
    """A chunk went through a block apart from the block's own unit.

    Attributes:
        seconds: Time that it took.
    """

    NAME: ClassVar[str] = "passed"
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uploaded(Event):
    """A file of the model is at the Hub."""

    NAME: ClassVar[str] = "uploaded"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UploadFailed(Event):
    """A unit's files could not be uploaded while the run went on.

    Attributes:
        unit: Name of the unit.
        cause: Why.
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
        cause: Why.
    """

    NAME: ClassVar[str] = "publish_failed"
    cause: str


_KINDS: tuple[type[Event], ...] = (
    Opened, Started, Joined, Began, Finished, Failed, Damaged, Passed, Uploaded, UploadFailed, Published, PublishFailed,
)  # fmt: skip
_BY_NAME = {kind.NAME: kind for kind in _KINDS}

Kind = TypeVar("Kind", bound=Event)
OfUnit = TypeVar("OfUnit", Damaged, Failed)


@dataclasses.dataclass(frozen=True)
class Journal:
    """A file of lines.

    Attributes:
        path: File of the journal, which need not be there yet.
    """

    path: Path

    def note(self, event: str, **details: Any) -> None:
        """Append one line.

        Args:
            event: Name of the event.
            details: What else the line shall say, as JSON types.

        Raises:
            StorageError: The file system refused.
        """
        line = json.dumps({"time": round(time.time(), 3), "event": event} | details)
        try:
            with self.path.open("ab+") as journal:
                end = journal.seek(0, os.SEEK_END)
                journal.seek(max(end - 1, 0))
                # A line that was cut short stays a line of its own.
                begin = b"" if journal.read(1) in (b"", b"\n") else b"\n"
                journal.write(begin + line.encode() + b"\n")
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error}. What is finished is kept") from error

    def events(self) -> list[Event]:
        """What was noted and is known, oldest first."""
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        return [event for event in map(_parse, text.splitlines()) if event is not None]

    def of_kind(self, kind: type[Kind]) -> list[Kind]:
        """What was noted of one kind of event, oldest first.

        Args:
            kind: Class of the event.
        """
        return [event for event in self.events() if isinstance(event, kind)]


def last_of_each_unit(events: Iterable[OfUnit]) -> tuple[OfUnit, ...]:
    """The newest event of every unit, the oldest unit first: what was noted of a unit in every session counts once.

    Args:
        events: Events, oldest first.
    """
    return tuple({event.unit: event for event in events}.values())


def _parse(line: str) -> Event | None:
    """A line; None where a process was killed, or a disk full, in the middle of it."""
    try:
        content = json.loads(line)
        kind = _BY_NAME.get(content["event"])
        return kind.from_json(content) if kind else None
    except (ValueError, KeyError, TypeError):
        return None
