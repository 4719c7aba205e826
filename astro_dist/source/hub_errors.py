"""What a request to the Hub came to when it failed: whether it may pass, how long to wait, what to say and to do."""

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
"""Answers of a server that may be another one in a while."""
_LONGEST_ASKED_S = 300.0
"""What a server may ask to wait: the Hub counts requests in windows of five minutes."""
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
    """One request that failed.

    Attributes:
        status: of the Hub's answer, None where there was none.
        reason: one line, without secrets.
        passes: whether the same request may work in a while.
        wait_s: how long the Hub asks to wait.
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
    """The Hub refused, or could not be reached often enough.

    Attributes:
        failure: the last one.
    """

    def __init__(self, message: str, failure: HubFailure) -> None:
        super().__init__(message, failure)
        self.failure = failure

    def __str__(self) -> str:
        return str(self.args[0])


def failure_of(error: Exception) -> HubFailure:
    """What an exception of huggingface_hub means."""
    cause: BaseException = error
    while not isinstance(cause, hub_errors.HTTPError) and cause.__cause__ is not None:
        cause = cause.__cause__  # an upload's errors are wrapped
    if isinstance(cause, hub_errors.HfHubHTTPError):
        status = cause.response.status_code
        said, asked_s = without_secrets(cause.server_message or str(cause)), asked_wait_s(cause.response.headers)
        if not str(cause.response.url).startswith(huggingface_hub.constants.ENDPOINT):
            return HubFailure(None, f"the store behind the Hub answers {status}: {said}", True, asked_s)  # expired link
        return HubFailure(status, said, status in PASSING, asked_s)
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
    """Seconds that a server asks to wait: by `Retry-After`, or by the Hub's `RateLimit: "api";r=0;t=55`, none left."""
    window = re.search(r"\br=0\b.*\bt=(\d+)", headers.get("RateLimit", ""))
    try:
        return min(float(headers.get("Retry-After", window[1] if window else 0)), _LONGEST_ASKED_S)
    except ValueError:
        return 0.0


def without_secrets(text: str) -> str:
    """A message on one line, without signatures of links, and without the token: some libraries quote headers."""
    token = huggingface_hub.get_token()
    line = without_query(" ".join(text.split()))
    return line.replace(token, "***") if token else line
