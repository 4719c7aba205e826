"""Keep pieces of remote files on local disk, shared by the workers of a node and limited in size."""

import contextlib
import fcntl
import hashlib
import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["RangeCache", "cache_folder"]

_LOCKS = 1024
_CHECKSUM_BYTES = 4


def cache_folder() -> Path:
    """Return the folder where this machine keeps what can be fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "astro-dist"


class RangeCache:
    """A range cache keeps each piece as a file of a folder and deletes the pieces that were not used for longest.

    A piece that two workers want at once is fetched once. A piece that cannot be kept, because it is too large or the
    disk refuses, is returned all the same: the cache saves traffic, and nothing depends on it.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Prepare the cache; nothing is read or written yet.

        Args:
            folder: Folder of the cache, which need not exist yet.
            max_bytes: Size that all pieces together never exceed, in bytes.
        """
        self._folder = folder
        self._max_bytes = max_bytes

    def get(self, key: str, length: int, fetch: Callable[[], bytes]) -> bytes:
        """Return a piece from the cache, or fetch it and keep it.

        Args:
            key: Text that tells the piece from every other one.
            length: Size of the piece in bytes.
            fetch: Function that fetches the piece.
        """
        name = hashlib.sha256(key.encode()).hexdigest()[:40]
        try:
            with self._locked(f"{int(name[:8], 16) % _LOCKS:04d}"):
                piece = self._read(name, length)
                if piece is None:
                    piece = fetch()
                    self._keep(name, piece)
                return piece
        except _NoCache:
            return fetch()

    def _read(self, name: str, length: int) -> bytes | None:
        path = self._folder / name
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        piece, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        return piece if len(piece) == length and checksum == _checksum(piece) else None

    def _keep(self, name: str, piece: bytes) -> None:
        """Make room for a piece and write it."""
        needed = len(piece) + _CHECKSUM_BYTES
        partial = self._folder / f".{uuid.uuid4().hex}.part"
        with contextlib.suppress(OSError, _NoCache), self._locked("room"):
            if needed > self._max_bytes:
                return
            files = [(path, path.stat()) for path in self._folder.iterdir() if path.is_file()]
            total = sum(status.st_size for _, status in files)
            for path, status in sorted(files, key=lambda file: file[1].st_mtime_ns):
                if total + needed <= self._max_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= status.st_size
            try:
                partial.write_bytes(piece + _checksum(piece))
                partial.replace(self._folder / name)
            finally:
                partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        try:
            locks = self._folder / "locks"
            locks.mkdir(parents=True, exist_ok=True)
            lock = (locks / name).open("w")
        except OSError as error:
            raise _NoCache from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise _NoCache from error
            yield


class _NoCache(Exception):
    """The folder of the cache cannot be used."""


def _checksum(piece: bytes) -> bytes:
    return zlib.crc32(piece).to_bytes(_CHECKSUM_BYTES, "little")
