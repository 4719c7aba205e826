"""What is checked at the Hub before any worker starts: token, rights, names, what the repository holds."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id

from astro.errors import ConfigError, RunError
from astro_dist.publish.hub_client import HubWriter
from astro_dist.source.hub_errors import HubError
from astro_dist.source.model_info import BaseModel

__all__ = ["Ready", "preflight"]

_TOKEN = re.compile(r"[\x21-\x7e]+")
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".msgpack", ".h5")
_WRITING = ("write", "admin", "contributor", "god")


@dataclasses.dataclass(frozen=True)
class Ready:
    """A repository that can be written to.

    Attributes:
        head: commit that its branch is at.
        notes: what the user should know.
    """

    head: str
    notes: tuple[str, ...]


def preflight(writer: HubWriter, weights: Collection[str], base: BaseModel, card: huggingface_hub.ModelCard) -> Ready:
    """Find out whether the model can be published, and make the repository and the branch where they are not there.

    Args:
        writer: of the repository.
        weights: names of the shards that there will be.
        base: what is quantized.
        card: whose metadata the Hub shall check.

    Raises:
        ConfigError: it cannot, and why.
        RunError: it cannot now: the Hub is not reached, or does not answer as it should.
    """
    target, place = writer.target, f"publish.repo {writer.repository}"
    try:
        validate_repo_id(writer.repository)
        _require_token(place)
        account = writer.patiently("asking who the token belongs to", writer.api.whoami)
        _require_rights(account, writer.repository, target.pull_request, place)
        if not target.pull_request:
            writer.patiently(
                "making the repository",
                lambda: writer.api.create_repo(writer.repository, private=target.private, exist_ok=True),
            )
        if target.revision and not target.revision.startswith("refs/"):
            branch = target.revision
            writer.patiently(
                f"making the branch {branch}",
                lambda: writer.api.create_branch(writer.repository, branch=branch, exist_ok=True),
            )
        info = writer.patiently(
            "looking at the repository", lambda: writer.api.model_info(writer.repository, revision=writer.branch)
        )
        _require_fit(info, target.private and not target.pull_request, weights, place)
        _require_writeable(writer)
        writer.patiently("checking the card's metadata", card.validate)
    except HubError as error:
        if error.failure.passes:
            raise RunError(
                f"publish.repo {error}. Nothing was sent; run the same command again in a while (behind a proxy, or "
                "with a Hub of your own, set HTTPS_PROXY and HF_ENDPOINT)"
            ) from error
        raise ConfigError(f"publish.repo {error}") from error
    except hub_errors.HFValidationError as error:
        raise ConfigError(f"{place}: {error}") from error
    seen = "private" if info.private else "public"
    told = f"the result goes to {writer.repository} ({seen}), {_where(writer)}, with the token of {account['name']}"
    return Ready(str(info.sha), (told, *base.notes(bool(info.private))))


def _where(writer: HubWriter) -> str:
    return "as a pull request" if writer.target.pull_request else f"branch {writer.branch}"


def _require_token(place: str) -> None:
    token = huggingface_hub.get_token()
    if token is None:
        raise ConfigError(
            f"{place}: there is no token; set HF_TOKEN where the driver runs, or `hf auth login` there. "
            "It must have the right to write"
        )
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"{place}: the token (HF_TOKEN) holds a space or a character that no token has")


def _require_rights(account: Mapping[str, Any], repository: str, as_pull_request: bool, place: str) -> None:
    """As far as the Hub says: what it does not say, it refuses later."""
    namespace = repository.partition("/")[0]
    roles = {org["name"]: org.get("roleInOrg") for org in account.get("orgs", ())}
    if not as_pull_request and namespace not in (account["name"], *roles):
        own = ", ".join((account["name"], *roles))
        raise ConfigError(
            f"{place}: the token belongs to {account['name']}, who is no member of {namespace}; it has {own}"
        )
    if not as_pull_request and roles.get(namespace) == "read":
        raise ConfigError(f"{place}: {account['name']} may only read in {namespace}; ask for the role of a contributor")
    token = account.get("auth", {}).get("accessToken", {})
    role = token.get("role")
    if role == "fineGrained":
        rights = ("repo", "discussion") if as_pull_request else ("repo",)
        _require_scope(token.get("fineGrained", {}), repository, rights, place)
    elif role is not None and role not in _WRITING:
        raise ConfigError(
            f"{place}: the token {token.get('displayName', '')!r} may only {role}; make one that may write at "
            "https://huggingface.co/settings/tokens"
        )


def _require_scope(told: Mapping[str, Any], repository: str, rights: tuple[str, ...], place: str) -> None:
    namespace, granted = repository.partition("/")[0], list(told.get("global", ()))
    for scope in told.get("scoped", ()):
        if scope.get("entity", {}).get("name") in (namespace, repository):
            granted += scope.get("permissions", ())
    if not any(right.startswith(rights) and right.endswith("write") for right in granted):
        raise ConfigError(
            f"{place}: the fine-grained token grants no write access to repositories of {namespace}; add it at "
            "https://huggingface.co/settings/tokens"
        )


def _require_fit(info: Any, private: bool, weights: Collection[str], place: str) -> None:
    """The repository as it is must not make something else of the model."""
    if private and not info.private:
        raise ConfigError(
            f"{place}: it is there already and everyone can see it, but publish.private is true; set it to false "
            "(--public), or choose another repository"
        )
    files = {file.rfilename for file in info.siblings or ()}
    foreign = sorted(name for name in files - set(weights) if name.endswith(_WEIGHTS))
    if foreign:
        raise ConfigError(
            f"{place}: it holds {len(foreign)} files of weights that are no part of this model, the first is "
            f"{foreign[0]}; remove them, or choose another repository or revision"
        )
    if ".gitignore" in files:
        raise ConfigError(f"{place}: it holds a .gitignore, by which the Hub may leave files out; remove it")


def _require_writeable(writer: HubWriter) -> None:
    """The question that comes before every upload; it changes nothing, and asks for the right to write."""
    probe = huggingface_hub.CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=b"#\n")
    writer.patiently(
        "asking whether it may be written to",
        lambda: writer.api.preupload_lfs_files(
            writer.repository, [probe], revision=writer.target.revision, create_pr=writer.target.pull_request
        ),
    )
