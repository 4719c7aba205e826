"""Where the files of a checkpoint lie: a folder, or any place that has names, sizes and byte ranges of files."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from astro.errors import CheckpointError

__all__ = ["FolderStore", "Range", "Store"]


@dataclasses.dataclass(frozen=True)
class Range:
    """Some bytes of a file, and the memory that they are read into.

    Attributes:
        file: Name of the file.
        start: Offset of the first byte in the file.
        view: Writeable memory; as many bytes are read as it holds.
    """

    file: str
    start: int
    view: memoryview


class Store(Protocol):
    """Files under one root, only ever read. A store travels to workers, so it holds no connection and no secret."""

    def __str__(self) -> str:
        """Return what messages call the root; `/` and a file's name may follow."""

    @property
    def revision(self) -> str | None:
        """Identifier of this state of the files; None where only the bytes themselves tell states apart."""

    def sizes(self) -> Mapping[str, int]:
        """Return the size in bytes of every file directly under the root, by name.

        Raises:
            CheckpointError: There is no such place, or it cannot be read.
        """

    def fill(self, ranges: Sequence[Range]) -> None:
        """Read byte ranges into their memory.

        Args:
            ranges: The ranges, in any order and of any files.

        Raises:
            CheckpointError: A file is missing, ends too early or cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class FolderStore:
    """A local folder, or one on a network file system.

    Attributes:
        folder: Path of the folder.
    """

    folder: Path

    def __str__(self) -> str:
        """Return the folder's path."""
        return str(self.folder)

    @property
    def revision(self) -> None:
        """None: the files of a folder may change under the same names."""
        return None

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file by name.

        Links are followed, since a hub cache is made of them. A path to a single file counts as a folder that holds
        this file, so that a later check can say what is wrong with it.
        """
        try:
            if self.folder.is_file():
                return {self.folder.name: self.folder.stat().st_size}
            if self.folder.is_dir():
                return {path.name: path.stat().st_size for path in sorted(self.folder.iterdir()) if path.is_file()}
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be read: {error}") from error
        raise CheckpointError(
            f"{self.folder}: no such folder; expected the folder of a model, with config.json and *.safetensors"
        )

    def fill(self, ranges: Sequence[Range]) -> None:
        """Read byte ranges. Nothing is mapped: a mapped file that is cut short while it is read ends the process."""
        for byte_range in ranges:
            path, view, done = self.folder / byte_range.file, byte_range.view, 0
            try:
                with path.open("rb", buffering=0) as handle:
                    handle.seek(byte_range.start)
                    while done < len(view):
                        count = handle.readinto(view[done:])
                        if not count:
                            raise CheckpointError(f"{path}: ends too early; it was cut short, fetch it again")
                        done += count
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from error
