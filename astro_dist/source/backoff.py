"""How requests that may work later are tried again: after waits that double, and no earlier than the server asks."""

import dataclasses
import time
from collections.abc import Callable

import tenacity

__all__ = ["Backoff"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backoff:
    """The waits between attempts, and when to give up.

    Attributes:
        first_s: The seconds between the first attempt and the second; every further wait is twice as long.
        longest_s: The seconds that no wait exceeds, unless the server asks for more.
        attempts: The number of attempts after which to give up; None means that their number is not limited.
        patience_s: The seconds since the first attempt after which to give up; None means that they are not limited.
    """

    first_s: float
    longest_s: float
    attempts: int | None = None
    patience_s: float | None = None

    def retrying(
        self,
        asked_wait_s: Callable[[Exception], float | None],
        before_wait: Callable[[Exception, int], None] = lambda error, attempt: None,
        sleep: Callable[[float], None] | None = None,
    ) -> tenacity.Retrying:
        """Return what calls a function until it works, and otherwise raises the last error as it is.

        Args:
            asked_wait_s: Returns the seconds that the server asked to wait with this error, 0 where it asked for
                nothing, and None where the same call cannot work later: such an error is raised at once.
            before_wait: Receives the error and the number of attempts before each wait.
            sleep: Waits for a number of seconds; `time.sleep` where it is not given.
        """
        doubling = tenacity.wait_exponential(multiplier=self.first_s, max=self.longest_s)
        stops: list[tenacity.stop.stop_base] = []
        if self.attempts is not None:
            stops.append(tenacity.stop_after_attempt(self.attempts))
        if self.patience_s is not None:
            stops.append(tenacity.stop_after_delay(self.patience_s))
        return tenacity.Retrying(
            # What is no Exception, an interrupt by the user, is never tried again.
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, Exception) and asked_wait_s(error) is not None
            ),
            wait=lambda state: max(doubling(state), asked_wait_s(_error_of(state)) or 0.0),
            stop=tenacity.stop_any(*stops),
            before_sleep=lambda state: before_wait(_error_of(state), state.attempt_number),
            sleep=sleep or time.sleep,
            reraise=True,
        )


def _error_of(state: tenacity.RetryCallState) -> Exception:
    """Return what the last attempt raised."""
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, Exception), "nothing else is tried again"
    return error
