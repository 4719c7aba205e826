"""Files of hidden states that are read, and copied to the device, while the device is at work on the ones before."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import torch

from astro.errors import CheckpointError, DamagedError
from astro.storage.checked_tensors import load_part
from astro.storage.device_copies import DeviceCopies, OnDevice

__all__ = ["Prefetch", "ReadAhead"]

Key = TypeVar("Key")
Read = TypeVar("Read")


class ReadAhead(Generic[Key, Read]):
    """Reads one thing at a time in a thread of its own, and keeps it until it is asked for or another is wanted."""

    def __init__(self) -> None:
        """Begin with nothing."""
        # The thread adds checksums up without helpers. OpenMP would give it threads of its own, which together with
        # those at work are more than there are cores, and would from then on let all of them sleep between two
        # operations instead of waiting awake.
        self._pool = ThreadPoolExecutor(1, "read-ahead", initializer=torch.set_num_threads, initargs=(1,))
        self._next: tuple[Key, Future[Read]] | None = None

    def expect(self, key: Key, read: Callable[[], Read]) -> None:
        """Begin to read what will be wanted, if that is not begun already.

        Args:
            key: What is read.
            read: Function that reads it.
        """
        if self._next is None or self._next[0] != key:
            self.forget()
            self._next = key, self._pool.submit(read)

    def reading(self, key: Key) -> "Future[Read] | None":
        """Return the reading of something that was expected; None where it was not.

        Args:
            key: What is read.
        """
        return self._next[1] if self._next is not None and self._next[0] == key else None

    def take(self, key: Key) -> Read | None:
        """Return what was read; None where it was not expected, or where reading failed and is to be tried again.

        Args:
            key: What is read.
        """
        reading, self._next = self.reading(key), None
        if reading is None:
            return None
        try:
            return reading.result()
        except (DamagedError, CheckpointError):  # the file may have been made again since
            return None

    def forget(self) -> None:
        """Let go of what was read, or is being read."""
        if self._next is not None:
            self._next[1].cancel()
            self._next = None


class Prefetch:
    """Reads the files that will be wanted next, one or two, and copies them to the device."""

    def __init__(self, copies: DeviceCopies) -> None:
        """Begin with no file.

        Args:
            copies: Copies to the device on which the tensors are wanted.
        """
        self._copies = copies
        self._ahead: ReadAhead[tuple[Path, ...], dict[Path, OnDevice]] = ReadAhead()

    def expect(self, *paths: Path) -> None:
        """Begin to read files that will be wanted, if all of them are there by now.

        To find out, folders are listed: asking for a file that another machine is yet to write would make a network
        file system remember that it is missing.

        Args:
            paths: Paths of the files.
        """
        if self.reading(*paths) is None and all(map(_is_listed, paths)):
            self._ahead.expect(paths, lambda: {path: self._read(path) for path in paths})

    def reading(self, *paths: Path) -> "Future[dict[Path, OnDevice]] | None":
        """Return the reading of files that were expected; None where they were not.

        Args:
            paths: Paths of the files, as they were expected.
        """
        return self._ahead.reading(paths)

    def take(self, *paths: Path) -> list[dict[str, torch.Tensor]]:
        """Return the tensors of files by name, on the device, as `load_part` reads them.

        Args:
            paths: Paths of the files, as they were expected.

        Raises:
            DamagedError: A file is missing, cut short, or differs from what was written.
        """
        read = self._ahead.take(paths) or {path: self._read(path) for path in paths}
        return [read[path].wait() for path in paths]

    def forget(self) -> None:
        """Let go of the files that were read, or are being read."""
        self._ahead.forget()

    def _read(self, path: Path) -> OnDevice:
        return self._copies.to_device(load_part(path)[0])


def _is_listed(path: Path) -> bool:
    try:
        with os.scandir(path.parent) as entries:
            return any(entry.name == path.name for entry in entries)
    except FileNotFoundError:
        return False
