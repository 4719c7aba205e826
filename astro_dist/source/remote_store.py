"""Checkpoints behind a network, read by byte ranges.

A tensor is fetched in pieces, several at a time, each tried again when the connection fails; a bounded cache on local
disk keeps them for the other workers of the node. Neither credentials nor connections are part of a store: every
machine finds its own (HF_TOKEN or `hf auth login`; the environment of the object store).
"""

import dataclasses
import functools
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from astro.errors import CheckpointError
from astro.storage.byte_store import Range
from astro_dist.source.range_cache import RangeCache, cache_folder

__all__ = ["Passing", "RemoteFiles", "RemoteStore", "without_query"]

_PIECE_BYTES = 1 << 24
_PARALLEL = 8
_PATIENCE_S = 600.0
"""How long a piece of which nothing comes is asked for again and again."""
_FIRST_WAIT_S, _MAX_WAIT_S = 0.5, 30.0


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
        """Bytes of a file, however many attempts that takes; what has come is kept between them."""
        found, wait_s, attempts, since = b"", _FIRST_WAIT_S, 0, time.monotonic()
        while len(found) < length:
            try:
                more = self.files.fetch(file, start + len(found), length - len(found))
                if not more:
                    raise Passing(f"ends {length - len(found)} bytes too early")
                found, wait_s, attempts, since = found + more, _FIRST_WAIT_S, 0, time.monotonic()
            except Passing as error:
                attempts += 1
                if time.monotonic() - since > _PATIENCE_S:
                    raise CheckpointError(
                        f"{self}/{file}: bytes {start} to {start + length} cannot be fetched, tried {attempts} times "
                        f"in {_PATIENCE_S:.0f} s; the last time: {error}. What is finished is kept; run the same "
                        "command to go on"
                    ) from error
                time.sleep(max(wait_s, error.wait_s))
                wait_s = min(2 * wait_s, _MAX_WAIT_S)
        return found


def without_query(text: str) -> str:
    """A message without what stands behind a `?` in URLs: signatures of links that are as good as a password."""
    return re.sub(r"\?[^\s'\"]+", "?...", text)
