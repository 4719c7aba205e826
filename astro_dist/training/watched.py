"""A training in a thread of its own, so that Ctrl-C and SIGTERM reach who watches it, and it ends behind a step."""

import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from astro_dist.execution.termination import Terminated

__all__ = ["run_watched"]

_log = logging.getLogger("astro_dist")

_LOOK_S = 0.2
"""Seconds between two looks at what workers have said."""
_INTERRUPTED_S, _TERMINATED_S = 120.0, 8.0
"""Seconds in which a training must have ended behind its step with a checkpoint: after Ctrl-C, and after SIGTERM, which
leaves less time (`execution.termination`)."""


def run_watched(work: Callable[[], None], look: Callable[[], None], stop: Path, awaits_end: bool) -> None:
    """Let a training work in a thread, and look at it meanwhile.

    Args:
        work: The training. It ends early as soon as the file `stop` is there.
        look: Function that is called again and again; what it raises ends the training.
        stop: File that tells workers to end.
        awaits_end: Whether workers go on when this process leaves them, so that it waits for their end also where they
            failed.

    Raises:
        BaseException: What the training or `look` raised.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
        finally:
            has_ended.set()

    stop.unlink(missing_ok=True)
    # Not joined: before Python 3.13 a thread whose join is interrupted counts as ended, though it runs on.
    has_ended = threading.Event()
    threading.Thread(target=run, name="training", daemon=True).start()
    try:
        while not has_ended.wait(_LOOK_S):
            look()
    except (KeyboardInterrupt, Terminated) as interruption:
        is_terminated = isinstance(interruption, Terminated)
        again = "" if is_terminated else "; press Ctrl-C again to end at once"
        _log.info("the training ends behind this step, and writes a checkpoint%s", again)
        seconds = _TERMINATED_S if is_terminated else _INTERRUPTED_S
        if not _end(has_ended, stop, seconds):
            _log.info("the training did not end within %.0f s, so its last steps may be lost", seconds)
        look()
        for failure in failures:
            _log.warning("the training did not end in order: %s", failure)
        raise
    except BaseException:
        if awaits_end:
            _end(has_ended, stop, _INTERRUPTED_S)
        raise
    if failures:
        raise failures[0]


def _end(has_ended: threading.Event, stop: Path, seconds: float) -> bool:
    """Tell workers to end, and return whether they do so in time."""
    with contextlib.suppress(OSError):  # of a full disk: then workers end with this process
        stop.touch()
        return has_ended.wait(seconds)
    return False
