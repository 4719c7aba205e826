"""Files that are written while the device is at work on what comes next."""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from astro.storage.checked_tensors import save_part
from astro.storage.device_copies import DeviceCopies

__all__ = ["PartWriter"]

_UNFINISHED = 2
"""Files that are held in memory at most: one is written, and one waits for that."""


class PartWriter:
    """Copies parts from the device, and checks, writes and syncs them in a thread of its own, one after the other.

    Whoever begins to write has to call `finish` before telling anyone that a file is there.
    """

    def __init__(self, copies: DeviceCopies) -> None:
        """Begin with no file.

        Args:
            copies: Copies from the device on which the tensors are.
        """
        self._copies = copies
        # One thread of OpenMP, for the reason that `Prefetch` gives.
        self._pool = ThreadPoolExecutor(1, "writer", initializer=torch.set_num_threads, initargs=(1,))
        self._unfinished: deque[Future[None]] = deque()

    def begin(self, path: Path, tensors: Mapping[str, torch.Tensor], note: str = "") -> None:
        """Begin to write a part as `save_part` does. Where too many are unfinished already, wait for the oldest.

        Args:
            path: Where the file belongs.
            tensors: Tensors by name; nobody may change them before `finish` has returned.
            note: Text that is kept beside the tensors.

        Raises:
            StorageError: A file that was begun before could not be written.
        """
        while len(self._unfinished) >= _UNFINISHED:
            self._finish_oldest()
        copy = self._copies.to_host(tensors)
        self._unfinished.append(self._pool.submit(lambda: save_part(path, copy.wait(), note)))

    @property
    def last(self) -> "Future[None] | None":
        """The file that was begun last, behind all others; None where no file is unfinished."""
        return self._unfinished[-1] if self._unfinished else None

    def finish(self) -> None:
        """Wait until every file that was begun is whole.

        Raises:
            StorageError: One of them could not be written; the others are.
        """
        try:
            while self._unfinished:
                self._finish_oldest()
        finally:
            self.give_up()

    def give_up(self) -> None:
        """Wait until nothing is written any more, whether that worked or not: who began it has failed."""
        while self._unfinished:
            self._unfinished.popleft().exception()

    def _finish_oldest(self) -> None:
        self._unfinished.popleft().result()
