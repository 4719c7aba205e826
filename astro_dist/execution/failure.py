"""What is done about a call that came to nothing: pure, from the history of failures alone."""

import dataclasses
from collections import Counter
from typing import Literal

from astro.errors import AstroError, ConfigError, DamagedError, NumericalError, RunError, StorageError, UnsupportedError
from astro_dist.schedule.calls import Call, HeldCall

__all__ = ["Failure", "FailureHistory", "Kind", "kind_of"]

Kind = Literal["lost", "overdue", "raised", "storage", "damaged"]
_FINAL = (NumericalError, ConfigError, UnsupportedError)
"""The arithmetic is the same wherever it is done again: so are these."""
_KEPT = "What is finished is kept"
_STORAGE_WAIT_S = 15.0
_STORAGE_WAIT_GROWTH = 4.0
_ADVICE = {
    "lost": "a worker that dies again and again on one unit often wants more memory: lower calibration.chunk_samples",
    "overdue": "it hangs, or execution.call_timeout_s is too short",
    "raised": "where it is a matter of one device or node, take that out of the cluster",
    "storage": "free space, or mend the folder",
    "damaged": "the storage of the run directory returns other bytes than were written",
}


@dataclasses.dataclass(frozen=True)
class Failure:
    """One call that came to nothing.

    Attributes:
        unit: it belongs to.
        method: What the worker was to do, see `verb` of the calls.
        worker: number.
        kind: `lost`, its worker or node died or was cut off; `overdue`, it took longer than its deadline; `raised`, an
            error; `storage`, the run directory could not be written; `damaged`, a file of the run is not as written.
        cause: one line.
    """

    unit: str
    method: str
    worker: int
    kind: Kind
    cause: str


def kind_of(error: Exception, lost: bool) -> Kind:
    """Which kind of failure an error of a call is; `lost` where the worker went with it."""
    if lost:
        return "lost"
    if isinstance(error, StorageError):
        return "storage"
    return "damaged" if isinstance(error, DamagedError) else "raised"


class FailureHistory:
    """Counts failures, and says when it is enough.

    What is counted is what would fail again: a call, or a whole block that one worker has in hand. A node with eight
    workers may go, and each of its calls has failed once. A file that is found damaged counts for itself.
    """

    def __init__(self, max_retries: int) -> None:
        self._max_retries = max_retries
        self._attempts: Counter[Call | str] = Counter()

    def judge(self, failure: Failure, call: Call, error: Exception) -> float:
        """Take note of a failure.

        Args:
            failure: that happened.
            call: that failed.
            error: of the call.

        Returns:
            Seconds to wait before anything is tried again: a full disk wants time, all else none.

        Raises:
            AstroError: the error itself where trying again cannot help.
            RunError: it failed more often than is allowed, with the last cause.
        """
        if isinstance(error, _FINAL):
            raise _kept(error) from error
        subject: Call | str = call.unit if isinstance(call, HeldCall) else call
        if failure.kind == "damaged" and isinstance(error, DamagedError):
            subject = str(error.path)
        self._attempts[subject] += 1
        attempts = self._attempts[subject]
        if attempts > self._max_retries:
            cause = failure.cause.removesuffix(f". {_KEPT}")
            raise RunError(
                f"{failure.unit}, {failure.method} on worker {failure.worker}: {cause}. Attempt {attempts} of "
                f"{self._max_retries + 1} (execution.max_retries: {self._max_retries}); {_ADVICE[failure.kind]}. "
                f"{_KEPT}; run the same command to go on"
            ) from error
        return _STORAGE_WAIT_S * _STORAGE_WAIT_GROWTH ** (attempts - 1) if failure.kind == "storage" else 0.0


def _kept(error: AstroError) -> AstroError:
    # Found too late to be a matter of nothing having been started.
    return error if isinstance(error, NumericalError) else RunError(f"{error}. {_KEPT}")
