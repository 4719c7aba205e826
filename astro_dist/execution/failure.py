"""What is done about a call that came to nothing, which depends on the history of failures alone."""

import dataclasses
from collections import Counter
from typing import Literal

from astro.errors import (
    AstroError,
    ConfigError,
    DamagedError,
    MemoryShortage,
    NumericalError,
    RunError,
    StorageError,
    UnsupportedError,
)
from astro_dist.schedule.calls import Call, HeldCall

__all__ = ["Failure", "FailureHistory", "Kind", "is_defect", "kind_of"]

Kind = Literal["lost", "overdue", "raised", "memory", "storage", "damaged"]
_FINAL = (NumericalError, ConfigError, UnsupportedError)
"""Errors that every worker would raise again, because the arithmetic is the same everywhere."""
_DEFECTS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, NotImplementedError, TypeError, ValueError,
)  # fmt: skip
"""Errors by which Python says that code is wrong. Devices and networks fail with RuntimeError, OSError, MemoryError."""
_MEMORY_RETRIES = 1
"""Times that a call is tried again for which memory was too little: in a new process, whose memory is in one piece, and
perhaps on a device of which others hold less. What fails there too would fail everywhere, and takes minutes each time.
"""
_KEPT = "What is finished is kept"
_STORAGE_WAIT_S = 15.0
_STORAGE_WAIT_GROWTH = 4.0
_ADVICE = {
    "lost": "a worker that dies again and again on one unit often wants more memory: lower calibration.chunk_samples",
    "overdue": "it hangs, or execution.call_timeout_s is too short",
    "memory": (
        "lower calibration.chunk_samples, or set it to auto with execution.device_memory_gb (another output.dir then, "
        "because it is part of the run's identity), or use devices with more memory"
    ),
    "raised": "where it is a matter of one device or node, take that out of the cluster",
    "storage": "free space, or mend the folder",
    "damaged": "the storage of the run directory returns other bytes than were written",
}


@dataclasses.dataclass(frozen=True)
class Failure:
    """Describes a call that came to nothing.

    Attributes:
        unit: Name of the unit that the call belongs to.
        place: The same in words.
        method: Description of the call, which is the `verb` of its class.
        worker: Number of the worker.
        kind: Way in which the call failed. `lost`: its worker or node died or was cut off. `overdue`: it took longer
            than its deadline. `raised`: it raised an error. `memory`: its device had less memory than it wanted.
            `storage`: the run directory could not be written. `damaged`: a file of the run is not as it was written.
        cause: Reason, in one line.
    """

    unit: str
    place: str
    method: str
    worker: int
    kind: Kind
    cause: str


def kind_of(error: Exception, lost: bool) -> Kind:
    """Return the kind of failure that an error of a call is.

    Args:
        error: Error that the call raised, or that says how its worker was lost.
        lost: Whether the worker itself died or was cut off.
    """
    if lost:
        return "lost"
    if isinstance(error, StorageError):
        return "storage"
    if isinstance(error, MemoryShortage):
        return "memory"
    return "damaged" if isinstance(error, DamagedError) else "raised"


def is_defect(error: Exception) -> bool:
    """Tell whether an error comes of wrong code, of this project's or the model's, so that it would come everywhere.

    Args:
        error: Error that a call or the start of a worker raised.
    """
    return isinstance(error, _DEFECTS) and not isinstance(error, AstroError)


class FailureHistory:
    """Counts failures, and decides when there were too many.

    Failures are counted for what would fail again: for each call, or for a whole block that one worker holds. So when
    a node with eight workers dies, each of their calls has failed once. A damaged file has a count of its own.
    """

    def __init__(self, max_retries: int) -> None:
        """Begin without any failure.

        Args:
            max_retries: Number of times that the same call, block or file may fail before the run fails.
        """
        self._max_retries = max_retries
        self._attempts: Counter[Call | str] = Counter()

    def judge(self, failure: Failure, call: Call, error: Exception) -> float:
        """Take note of a failure.

        Args:
            failure: Failure that happened.
            call: Call that failed.
            error: Error of the call.

        Returns:
            Seconds to wait before any call is given out: a full disk needs time, other failures need none.

        Raises:
            AstroError: Trying again cannot help; this is the error of the call.
            RunError: The call, block or file failed more often than is allowed, or for wrong code; the message has the
                last cause.
        """
        if isinstance(error, _FINAL):
            raise _kept(error) from error
        if failure.kind == "raised" and is_defect(error):
            raise RunError(
                f"{failure.place}, {failure.method} on worker {failure.worker}: {failure.cause}. This is a defect in "
                "the code of astro-dist or of the model, and no fault of a device, so it is not tried again; report "
                f"it with what `astro-dist --debug` prints. {_KEPT}"
            ) from error
        subject: Call | str = call.unit if isinstance(call, HeldCall) else call
        if failure.kind == "damaged" and isinstance(error, DamagedError):
            subject = str(error.path)
        self._attempts[subject] += 1
        attempts, limit = self._attempts[subject], f"execution.max_retries: {self._max_retries}"
        retries = self._max_retries
        if failure.kind == "memory" and retries > _MEMORY_RETRIES:
            retries, limit = _MEMORY_RETRIES, "too little memory is seldom a matter of luck"
        if attempts > retries:
            cause = failure.cause.removesuffix(f". {_KEPT}")
            raise RunError(
                f"{failure.place}, {failure.method} on worker {failure.worker}: {cause}. Attempt {attempts} of "
                f"{retries + 1} ({limit}); {_ADVICE[failure.kind]}. "
                f"{_KEPT}; run the same command to go on"
            ) from error
        return _STORAGE_WAIT_S * _STORAGE_WAIT_GROWTH ** (attempts - 1) if failure.kind == "storage" else 0.0


def _kept(error: AstroError) -> AstroError:
    # Wrong input promises that nothing was started; that is not true any more, so it becomes a failed run.
    return error if isinstance(error, NumericalError) else RunError(f"{error}. {_KEPT}")
