"""Faults of the Hub that an upload may meet, each with the end that the command must come to.

The tests and the bench of publishing share them.
"""

import dataclasses

from tests.support.models import files_of


@dataclasses.dataclass(frozen=True)
class Fault:
    """Describes a fault, and what the command does about it.

    Attributes:
        label: Description of the fault.
        kind: Kind of request that meets it; see `ROUTES` in `hub_writing`.
        meets: Faults of the next requests of that kind; see `hub_writing`.
        code: Exit code of the command: 0 done, 1 failed, 2 refused before anything was sent.
        message: Text that the error contains.
    """

    label: str
    kind: str
    meets: tuple
    code: int = 0
    message: str = ""


AGAIN = "To go on: astro-dist publish"
FAULTS = [
    Fault("401: the token is not valid", "whoami", (401,), 2, "the token is not valid"),
    Fault("401 in the middle: the token was withdrawn", "batch", (None, None, 401), 1, AGAIN),
    Fault("403 where the repository is made", "create", (403,), 2, "may not do this"),
    Fault("403 where a shard is announced: the storage is used up", "batch", (403,), 1, "storage of the account"),
    Fault("403 from the store: its link has expired", "put", (None, 403)),
    Fault("403 at the commit", "commit", (403,), 1, AGAIN),
    Fault("404: the repository is gone", "batch", (None, 404), 1, "there is no such repository"),
    Fault("409 at the commit", "commit", (409,), 1, "stands against it"),
    Fault("413 at the commit", "commit", (413,), 1, "more than the Hub takes at once"),
    Fault("429 with Retry-After at a part", "put", (None, (429, {"Retry-After": "1"}))),
    Fault("429 with Retry-After at the commit", "commit", ((429, {"Retry-After": "1"}),)),
    Fault("429 at whoami", "whoami", ((429, {"RateLimit": '"api";r=0;t=1'}),)),
    Fault("500 at part 3 of a shard", "put", (None, None, 500)),
    Fault("500 where the parts are put together", "complete", (500,)),
    Fault("500 at the commit", "commit", (500,)),
    Fault("500 at the check of the card", "validate", (None, 500)),
    Fault("502, 503 where a shard is announced", "batch", (502, 503)),
    Fault("504 at the commit, which was not made", "commit", (504,)),
    Fault("504 at the commit, which was made", "commit", (("after", 504),)),
    Fault("the connection ends before the commit's answer", "commit", (("after", "cut"),)),
    Fault("the connection ends within the commit", "commit", ("cut",)),
    Fault("the connection is cut at part 4", "put", (None, None, None, "cut")),
    Fault("the connection is cut at part 4, three times", "put", (None, None, None, "cut", "cut", "cut")),
    Fault("500 at every commit", "commit", (500,) * 99, 1, "tried 5 times"),
]


def published(hub, repository, revision="main"):
    """Return the SHA-256 of every file of a repository by name, without the files that the Hub itself makes."""
    _, folder = hub.folder(repository, revision)
    return {name: sha256 for name, sha256 in files_of(folder, with_card=True).items() if name != ".gitattributes"}
