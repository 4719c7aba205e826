"""The lock of a run directory: one driver at a time works on a run."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from astro.errors import RunError

__all__ = ["held", "is_held"]


@contextlib.contextmanager
def held(root: Path) -> Iterator[None]:
    """Keep other drivers out of a run directory for a while; it is made where it is not there.

    Raises:
        RunError: another driver is at work here, or the folder cannot be written or locked.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = _path(root).open("w")
    except OSError as error:
        raise RunError(f"{root}: cannot be written: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{root}: another process is at work on this run; wait for it, or stop it first") from error
        except OSError as error:
            raise RunError(
                f"{root}: its file system cannot lock files ({error}); mount it with locks, so that two drivers never "
                "work on one run"
            ) from error
        yield


def is_held(root: Path) -> bool:
    """Whether a driver is at work on a run."""
    if not _path(root).is_file():
        return False
    with _path(root).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _path(root: Path) -> Path:
    return root / "lock"
