"""What the Hub already holds of a run's model, on disk beside the run: a repeated upload sends only what is missing.

It saves time and is no proof: before the one commit the Hub itself is asked for every large file.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from astro.errors import CheckpointError
from astro.storage.atomic import read_json, write_json
from astro_dist.export.inventory import ModelFile

__all__ = ["UploadRecord", "read_uploads"]


def read_uploads(path: Path) -> dict[str, Any]:
    """The record's content: by place `files` that were uploaded, by name, and `committed`, or null before the commit.

    Args:
        path: of the record. Where it is missing or damaged nothing counts as uploaded.
    """
    with contextlib.suppress(CheckpointError):
        return read_json(path)
    return {}


class UploadRecord:
    """Files that one place holds. Threads may share it."""

    def __init__(self, path: Path, place: str) -> None:
        """Nothing is read or written yet.

        Args:
            path: of the record.
            place: repository and revision; others in the same record are left alone.
        """
        self._path, self._place, self._lock = path, place, threading.Lock()

    def holds(self, file: ModelFile) -> bool:
        """Whether these very bytes were uploaded under this name."""
        found = self._own(read_uploads(self._path))["files"].get(file.name)
        return bool(found == _described(file))

    def add(self, file: ModelFile) -> None:
        """A file was uploaded."""
        self._change(lambda own: own["files"].update({file.name: _described(file)}))

    def forget(self, files: Iterable[ModelFile]) -> None:
        """The Hub does not hold these after all."""
        names = [file.name for file in files]
        self._change(lambda own: [own["files"].pop(name, None) for name in names])

    def commit(self, files: Iterable[ModelFile], committed: dict[str, Any]) -> None:
        """Everything is in the repository.

        Args:
            files: all of the model.
            committed: what to say of it.
        """
        held = {file.name: _described(file) for file in files}
        self._change(lambda own: own.update(files=held, committed=committed))

    def _change(self, change: Any) -> None:
        with self._lock:
            content = read_uploads(self._path)
            own = self._own(content)
            change(own)
            write_json(self._path, {**content, self._place: own})

    def _own(self, content: dict[str, Any]) -> dict[str, Any]:
        own: dict[str, Any] = content.get(self._place, {"files": {}, "committed": None})
        return own


def _described(file: ModelFile) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(file).items() if name != "name"}
