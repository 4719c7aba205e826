"""The lock of a run directory: one driver at a time works on a run."""

import contextlib
import errno
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from astro.errors import ConfigError, RunError

__all__ = ["NAME", "hold", "is_held"]

NAME = "lock"
"""The name of the file that is locked, in the run directory."""
_ATTEMPTS, _BETWEEN_S = 10, 0.1
"""Number of attempts to take the lock, and seconds between them. `is_held` itself holds the lock for a moment."""
_WRONG_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG,
    errno.ELOOP,
)  # fmt: skip
"""Errors of a folder that cannot be a run directory. Any other error may go away."""


@contextlib.contextmanager
def hold(root: Path) -> Iterator[None]:
    """Keep other drivers out of a run directory for a while. The directory is made where there is none.

    Args:
        root: Folder of the run directory.

    Raises:
        ConfigError: The folder cannot be made or written.
        RunError: Another driver works on the run, or the file system fails or cannot lock files.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = _path(root).open("w")
    except OSError as error:
        error_type = ConfigError if error.errno in _WRONG_PLACE else RunError
        raise error_type(f"{root}: the run directory (output.dir) cannot be written: {error}") from error
    with lock:
        try:
            taken = any(_take(lock, attempt) for attempt in range(_ATTEMPTS))
        except OSError as error:
            raise RunError(
                f"{root}: its file system cannot lock files ({error}); mount it with locks, so that two drivers never "
                "work on one run"
            ) from error
        if not taken:
            raise RunError(f"{root}: another process is at work on this run; wait for it, or stop it first")
        yield


def is_held(root: Path) -> bool:
    """Tell whether a driver works on a run.

    Args:
        root: Folder of the run directory.
    """
    if not _path(root).is_file():
        return False
    with _path(root).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:  # any other error is that of a file system without locks, where no driver works
            return isinstance(error, BlockingIOError)
    return False


def _take(lock: IO[str], attempt: int) -> bool:
    time.sleep(_BETWEEN_S * (attempt > 0))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _path(root: Path) -> Path:
    return root / NAME
