"""Record on disk what the Hub already holds of a run's model, so that a repeated upload sends only what is missing.

The record saves time and proves nothing: before the one commit, the Hub itself is asked for every large file.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from astro.errors import CheckpointError
from astro.storage.atomic import read_json, write_json
from astro_dist.run_directory.published_model import PublishedModel
from astro_dist.run_directory.unit_record import FileRecord

__all__ = ["PlaceUploads", "UploadRecord", "read_uploads"]


@dataclasses.dataclass(frozen=True)
class PlaceUploads:
    """Uploads go to one place each, which is a repository and a revision of it.

    Attributes:
        files: Files that were uploaded, by name.
        published: The commit that holds all of them; None before it was made.
    """

    files: Mapping[str, FileRecord] = dataclasses.field(default_factory=dict)
    published: PublishedModel | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the uploads as a JSON object."""
        files = {name: {"size_bytes": file.size_bytes, "sha256": file.sha256} for name, file in self.files.items()}
        return {"files": files, "committed": self.published.to_json() if self.published else None}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned.

        Args:
            content: JSON object with every field.
        """
        files = {name: FileRecord.from_json({"name": name, **file}) for name, file in content["files"].items()}
        committed = content["committed"]
        return cls(files, PublishedModel.from_json(committed) if committed else None)


def read_uploads(path: Path) -> dict[str, PlaceUploads]:
    """Read what was uploaded to each place.

    Args:
        path: Path of the record. Where it is missing or damaged, nothing counts as uploaded; where a place in it is,
            nothing counts as uploaded to that place.

    Returns:
        The uploads by place, in the order in which the places were first uploaded to.
    """
    places: dict[str, PlaceUploads] = {}
    with contextlib.suppress(CheckpointError):
        for place, uploads in read_json(path).items():
            with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
                places[place] = PlaceUploads.from_json(uploads)
    return places


class UploadRecord:
    """An upload record notes the uploads to one place. Several threads may share it."""

    def __init__(self, path: Path, place: str) -> None:
        """Prepare the record; nothing is read or written yet.

        Args:
            path: Path of the record, which holds other places too.
            place: Repository and revision.
        """
        self._path, self._place, self._lock = path, place, threading.Lock()

    def holds(self, file: FileRecord) -> bool:
        """Tell whether these very bytes were uploaded under this name."""
        uploads = read_uploads(self._path).get(self._place, PlaceUploads())
        return uploads.files.get(file.name) == file

    def add(self, file: FileRecord) -> None:
        """Note that a file was uploaded."""
        self._change(lambda uploads: dataclasses.replace(uploads, files={**uploads.files, file.name: file}))

    def forget(self, files: Iterable[FileRecord]) -> None:
        """Note that the place does not hold these files after all."""
        names = {file.name for file in files}

        def without(uploads: PlaceUploads) -> PlaceUploads:
            remaining = {name: file for name, file in uploads.files.items() if name not in names}
            return dataclasses.replace(uploads, files=remaining)

        self._change(without)

    def commit(self, files: Iterable[FileRecord], published: PublishedModel) -> None:
        """Note that the whole model is in the repository.

        Args:
            files: All files of the model.
            published: The commit that was made.
        """
        self._change(lambda uploads: PlaceUploads({file.name: file for file in files}, published))

    def _change(self, change: Callable[[PlaceUploads], PlaceUploads]) -> None:
        with self._lock:
            places = read_uploads(self._path)
            places[self._place] = change(places.get(self._place, PlaceUploads()))
            write_json(self._path, {place: uploads.to_json() for place, uploads in places.items()})
