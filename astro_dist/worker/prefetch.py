"""Files of hidden states that are read while the device is at work on the ones before."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from astro.errors import DamagedError
from astro.storage.checked_tensors import load_part

__all__ = ["Prefetch"]


class Prefetch:
    """Reads one file at a time in a thread of its own, and keeps it until it is asked for or another is wanted."""

    def __init__(self) -> None:
        """Begin with no file."""
        # The thread adds checksums up without helpers. OpenMP would give it threads of its own, which together with
        # those at work are more than there are cores, and would from then on let all of them sleep between two
        # operations instead of waiting awake.
        self._pool = ThreadPoolExecutor(1, "read-ahead", initializer=torch.set_num_threads, initargs=(1,))
        self._next: tuple[Path, Future[dict[str, torch.Tensor]]] | None = None

    def expect(self, path: Path) -> None:
        """Begin to read a file that will be wanted, if it is there by now.

        To find out, the folder is listed: asking for a file that another machine is yet to write would make a network
        file system remember that it is missing.

        Args:
            path: Path of the file.
        """
        if (self._next is None or self._next[0] != path) and _is_listed(path):
            self.forget()
            self._next = path, self._pool.submit(lambda: load_part(path)[0])

    def take(self, path: Path) -> dict[str, torch.Tensor]:
        """Return the tensors of a file by name, as `load_part` reads them.

        Args:
            path: Path of the file.

        Raises:
            DamagedError: The file is missing, cut short, or differs from what was written.
        """
        expected, self._next = self._next, None
        if expected is not None and expected[0] == path:
            try:
                return expected[1].result()
            except DamagedError:
                pass  # the file may have been made again since
        return load_part(path)[0]

    def forget(self) -> None:
        """Let go of the file that was read, or is being read."""
        if self._next is not None:
            self._next[1].cancel()
            self._next = None


def _is_listed(path: Path) -> bool:
    try:
        with os.scandir(path.parent) as entries:
            return any(entry.name == path.name for entry in entries)
    except FileNotFoundError:
        return False
