"""Checkpoints behind a network, read by byte ranges.

A tensor is fetched in pieces, several at a time, each tried again when the connection fails; a bounded cache on local
disk keeps them for the other workers of the node. Neither credentials nor connections are part of a store: every
machine finds its own (HF_TOKEN or `hf auth login`; the environment of the object store).
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
"""Bytes of which nothing comes are asked for again during ten minutes."""


class Passing(Exception):
    """A failure that may not happen again; how long the server asks to wait."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class RemoteFiles(Protocol):
    """Files behind a network."""

    @property
    def revision(self) -> str:
        """What tells this state of the files from every other."""

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file by name."""

    def fetch(self, file: str, start: int, length: int) -> bytes:
        """Some bytes of a file, at most as many as asked for.

        Raises:
            Passing: it may work if it is tried again.
            CheckpointError: it will not.
        """


@dataclasses.dataclass(frozen=True)
class RemoteStore:
    """A store in front of remote files.

    Attributes:
        files: what is read.
        cache_dir: on each machine; None is the user's own cache there.
        cache_bytes: that the cache may hold; 0 is none.
    """

    files: RemoteFiles
    cache_dir: Path | None
    cache_bytes: int

    def __str__(self) -> str:
        return str(self.files)

    @property
    def revision(self) -> str:
        """Of the files."""
        return self.files.revision

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file by name."""
        return self.files.sizes()

    def fill(self, ranges: Sequence[Range]) -> None:
        """Read byte ranges, in pieces that are the same whichever tensors are asked for together."""
        pieces = [
            dataclasses.replace(wanted, start=wanted.start + offset, view=wanted.view[offset : offset + _PIECE_BYTES])
            for wanted in ranges
            for offset in range(0, len(wanted.view), _PIECE_BYTES)
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
        """Return bytes of a file, however many requests that takes; what has come is kept between them."""
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
    """A message without what stands behind a `?` in URLs: signatures of links that are as good as a password."""
    return re.sub(r"\?[^\s'\"]+", "?...", text)
