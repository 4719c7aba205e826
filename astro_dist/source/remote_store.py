"""Read checkpoints over a network by byte ranges.

A tensor is fetched in pieces, several at a time, and each piece is tried again when the connection fails. A cache of
limited size on local disk keeps the pieces for the other workers of the node. A store holds neither credentials nor
connections: every machine finds its own (HF_TOKEN or `hf auth login`; the environment of the object store).
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from astro.errors import CheckpointError
from astro.storage.byte_store import Range
from astro_dist.source.backoff import Backoff
from astro_dist.source.range_cache import RangeCache, cache_folder

__all__ = ["Passing", "RemoteFiles", "RemoteStore", "without_query"]

_PIECE_BYTES = 1 << 24
_PARALLEL = 8
_BACKOFF = Backoff(first_s=0.5, longest_s=30.0, patience_s=600.0)
"""Waits between requests for the same bytes; after ten minutes without any byte they are given up."""


class Passing(Exception):
    """A request failed and may work later.

    Attributes:
        wait_s: Seconds that the server asks to wait; 0 where it asks for nothing.
    """

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class RemoteFiles(Protocol):
    """Remote files are read over a network."""

    @property
    def revision(self) -> str:
        """Return the text that tells this state of the files from every other."""

    def sizes(self) -> Mapping[str, int]:
        """Return the size in bytes of every file that is in no folder, by name."""

    def every_size(self) -> Mapping[str, int]:
        """Return the size in bytes of every file that is known, also in folders, by its path."""

    def fetch(self, file: str, start: int, length: int) -> bytes:
        """Fetch some bytes of a file, at most as many as asked for.

        Args:
            file: Name of the file.
            start: Offset of the first byte.
            length: Number of bytes.

        Raises:
            Passing: The same request may work later.
            CheckpointError: The same request cannot work later.
        """


@dataclasses.dataclass(frozen=True)
class RemoteStore:
    """A remote store reads remote files through a cache on local disk.

    Attributes:
        files: Files that are read.
        cache_dir: Folder of the cache on each machine; None means the cache folder of the user there.
        cache_bytes: Largest size of the cache in bytes; 0 means no cache.
    """

    files: RemoteFiles
    cache_dir: Path | None
    cache_bytes: int

    def __str__(self) -> str:
        return str(self.files)

    @property
    def revision(self) -> str:
        """Return the revision of the files."""
        return self.files.revision

    def sizes(self) -> Mapping[str, int]:
        """Return the size in bytes of every file, by name."""
        return self.files.sizes()

    def fill(self, ranges: Sequence[Range]) -> None:
        """Read byte ranges in pieces, whose bounds do not depend on which tensors are read together.

        Args:
            ranges: Ranges of bytes, each with the memory that it is read into.

        Raises:
            CheckpointError: Some bytes cannot be fetched.
        """
        pieces = [
            dataclasses.replace(whole, start=whole.start + offset, view=whole.view[offset : offset + _PIECE_BYTES])
            for whole in ranges
            for offset in range(0, len(whole.view), _PIECE_BYTES)
        ]
        if len(pieces) == 1:
            self._fill_piece(pieces[0])
            return
        with ThreadPoolExecutor(_PARALLEL) as pool:
            for _ in pool.map(self._fill_piece, pieces):
                pass

    def _fill_piece(self, piece: Range) -> None:
        length = len(piece.view)
        key = f"{self.files}|{self.revision}|{piece.file}|{piece.start}|{length}"
        fetch = functools.partial(self._fetch, piece.file, piece.start, length)
        cache = RangeCache((self.cache_dir or cache_folder()) / "pieces", self.cache_bytes)
        piece.view[:] = cache.get(key, length, fetch) if length else b""

    def _fetch(self, file: str, start: int, length: int) -> bytes:
        """Return bytes of a file by as many requests as that takes; what arrived is not asked for again."""
        content = b""
        while len(content) < length:
            content += self._next_bytes(file, start + len(content), length - len(content))
        return content

    def _next_bytes(self, file: str, start: int, length: int) -> bytes:
        """Return the first bytes of a range, one at least, as many as one request brings.

        Raises:
            CheckpointError: None of them could be fetched.
        """

        def attempt() -> bytes:
            content = self.files.fetch(file, start, length)
            if not content:
                raise Passing(f"ends {length} bytes too early")
            return content

        retrying = _BACKOFF.retrying(lambda error: error.wait_s if isinstance(error, Passing) else None)
        try:
            return retrying(attempt)
        except Passing as error:
            attempts = retrying.statistics["attempt_number"]
            raise CheckpointError(
                f"{self}/{file}: bytes {start} to {start + length} cannot be fetched, tried {attempts} times in "
                f"{_BACKOFF.patience_s:.0f} s; the last time: {error}. What is finished is kept; run the "
                "same command to go on"
            ) from error


def without_query(text: str) -> str:
    """Remove what follows a `?` in the URLs of a message: a signature there is as good as a password."""
    return re.sub(r"\?[^\s'\"]+", "?...", text)
