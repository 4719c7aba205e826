"""Where the files of a checkpoint lie: in a folder, or wherever names, sizes and byte ranges can be had."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from astro.errors import CheckpointError

__all__ = ["FolderStore", "Range", "Store"]


@dataclasses.dataclass(frozen=True)
class Range:
    """Some bytes of a file, and where they shall go.

    Attributes:
        file: name.
        start: first byte.
        view: writeable bytes, filled to its end.
    """

    file: str
    start: int
    view: memoryview


class Store(Protocol):
    """Files under one root, only ever read. It travels to workers, so it holds no connection and no secret."""

    def __str__(self) -> str:
        """What messages call it; `/` and a file's name may follow."""

    @property
    def revision(self) -> str | None:
        """What tells this state of the files from every other; None where only the bytes themselves do."""

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file directly under the root, by name.

        Raises:
            CheckpointError: there is no such place, or it cannot be read.
        """

    def fill(self, ranges: Sequence[Range]) -> None:
        """Read byte ranges.

        Raises:
            CheckpointError: a file is missing, ends too early or cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class FolderStore:
    """A local folder, or one on a network file system.

    Attributes:
        folder: where the files are.
    """

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def revision(self) -> None:
        """Files of a folder may change under the same names."""
        return None

    def sizes(self) -> dict[str, int]:
        """Bytes of every file by name. Links are followed: a hub cache is made of them. A single file is a folder of
        itself, so that what is wrong with it can be said.
        """
        try:
            if self.folder.is_file():
                return {self.folder.name: self.folder.stat().st_size}
            if self.folder.is_dir():
                return {path.name: path.stat().st_size for path in sorted(self.folder.iterdir()) if path.is_file()}
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be read: {error}") from error
        raise CheckpointError(
            f"{self.folder}: no such folder; model.source, or what `verify` is given, is a folder with config.json "
            "and *.safetensors, a Hub repository (ORG/NAME) or a URL of an object store (s3://..., gs://...)"
        )

    def fill(self, ranges: Sequence[Range]) -> None:
        """Read byte ranges. Nothing is mapped: a mapped file that is cut short meanwhile ends the process."""
        for wanted in ranges:
            path, view, done = self.folder / wanted.file, wanted.view, 0
            try:
                with path.open("rb", buffering=0) as handle:
                    handle.seek(wanted.start)
                    while done < len(view):
                        count = handle.readinto(view[done:])
                        if not count:
                            raise CheckpointError(f"{path}: ends too early; it was cut short, fetch it again")
                        done += count
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from error
