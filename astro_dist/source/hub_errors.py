"""Explain a failed request to the Hub: whether it may work later, how long to wait, what to say and what to do."""

import dataclasses
import json
import re
from collections.abc import Mapping

import huggingface_hub
from huggingface_hub import errors as hub_errors

from astro.errors import RunError
from astro_dist.source.remote_store import without_query

__all__ = ["PASSING", "HubError", "HubFailure", "asked_wait_s", "failure_of", "without_secrets"]

PASSING = (408, 429, 500, 502, 503, 504)
"""Status codes of a server after which the same request may work later."""
_LONGEST_ASKED_S = 300.0
"""Longest wait that a server may ask for: the Hub counts requests in windows of five minutes."""
_FINAL = (hub_errors.LocalTokenNotFoundError, hub_errors.HFValidationError)
_ADVICE = {
    400: "the Hub does not take what it was sent",
    401: "the token is not valid, or not any more; set HF_TOKEN, or `hf auth login`",
    402: "see to the billing of the account",
    403: "the token or its owner may not do this, or the storage of the account is used up; see "
    "https://huggingface.co/settings/tokens and https://huggingface.co/settings/billing",
    404: "there is no such repository or revision, or this token does not see it",
    409: "what is there already stands against it, or another operation is at work; look at the repository",
    412: "the repository has changed meanwhile; look at it",
    413: "it is more than the Hub takes at once; see https://huggingface.co/docs/hub/storage-limits",
}


@dataclasses.dataclass(frozen=True)
class HubFailure:
    """A Hub failure says why one request failed.

    Attributes:
        status: Status code of the Hub's answer; None where there was no answer.
        reason: Reason in one line, without secrets.
        passes: Whether the same request may work later.
        wait_s: Seconds that the Hub asks to wait; 0 where it asks for nothing.
    """

    status: int | None
    reason: str
    passes: bool
    wait_s: float = 0.0

    def __str__(self) -> str:
        answer = f"the Hub answers {self.status}: " if self.status else ""
        advice = "" if self.passes else _ADVICE.get(self.status or 0, "")
        return f"{answer}{self.reason}{f'; {advice}' if advice else ''}"


class HubError(RunError):
    """The Hub refused a request, or failed at every attempt.

    Attributes:
        failure: Failure of the last attempt.
    """

    def __init__(self, message: str, failure: HubFailure) -> None:
        super().__init__(message, failure)
        self.failure = failure

    def __str__(self) -> str:
        return str(self.args[0])


def failure_of(error: Exception) -> HubFailure:
    """Find out what an exception of huggingface_hub means.

    Args:
        error: Exception as the client raised it.
    """
    cause: BaseException = error
    while not isinstance(cause, hub_errors.HTTPError) and cause.__cause__ is not None:
        cause = cause.__cause__  # an upload's errors are wrapped
    if isinstance(cause, hub_errors.HfHubHTTPError):
        status = cause.response.status_code
        reason, asked_s = without_secrets(cause.server_message or str(cause)), asked_wait_s(cause.response.headers)
        if not str(cause.response.url).startswith(huggingface_hub.constants.ENDPOINT):
            # A link that has expired: the Hub gives a new one.
            return HubFailure(None, f"the store behind the Hub answers {status}: {reason}", True, asked_s)
        return HubFailure(status, reason, status in PASSING, asked_s)
    if isinstance(cause, hub_errors.OfflineModeIsEnabled):
        return HubFailure(None, "the Hub is not asked: HF_HUB_OFFLINE is set", passes=False)
    reason = f"{type(cause).__name__}: {without_secrets(str(cause))}"
    if isinstance(cause, hub_errors.HTTPError):  # of whichever HTTP library: no answer, or half of one
        return HubFailure(None, f"the connection failed: {reason}", passes=True)
    if isinstance(cause, (*_FINAL, OSError)):
        return HubFailure(None, reason, passes=False)
    of_server = isinstance(cause, json.JSONDecodeError) or "LFS batch API" in str(cause)
    return HubFailure(None, reason, passes=of_server or not isinstance(cause, ValueError))


def asked_wait_s(headers: Mapping[str, str]) -> float:
    """Return the seconds that a server asks to wait, 0 where it asks for nothing.

    Args:
        headers: Headers of the answer. `Retry-After` counts first, then the Hub's `RateLimit: "api";r=0;t=55`, which
            means that no request is left for 55 seconds.
    """
    window = re.search(r"\br=0\b.*\bt=(\d+)", headers.get("RateLimit", ""))
    try:
        return min(float(headers.get("Retry-After", window[1] if window else 0)), _LONGEST_ASKED_S)
    except ValueError:
        return 0.0


def without_secrets(text: str) -> str:
    """Put a message on one line and remove signatures of links and the token, since some libraries quote headers."""
    token = huggingface_hub.get_token()
    line = without_query(" ".join(text.split()))
    return line.replace(token, "***") if token else line
