"""The journal of a run: what happened when, one JSON object a line, only ever appended to."""

import dataclasses
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from astro.errors import StorageError

__all__ = ["Journal", "last_of_each_unit"]


@dataclasses.dataclass(frozen=True)
class Journal:
    """A file of lines.

    Attributes:
        path: of the file, which need not be there yet.
    """

    path: Path

    def note(self, event: str, **details: Any) -> None:
        """Append one line.

        Raises:
            StorageError: the file system refused.
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

    def lines(self, event: str | None = None) -> list[dict[str, Any]]:
        """What was noted, oldest first: all of it, or the lines of one event."""
        written = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        parsed = [_parse(line) for line in written]
        return [line for line in parsed if line and event in (None, line["event"])]


def last_of_each_unit(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest line of every unit, the oldest unit first: what was noted of one in every session counts once."""
    return list({line["unit"]: line for line in lines}.values())


def _parse(line: str) -> dict[str, Any]:
    """A line; nothing where a process was killed, or a disk full, in the middle of it."""
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) and "event" in content else {}
