"""Check at the Hub, before any worker starts, the token, its rights, the names and what the repository holds."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any, Self

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
    """A repository is ready when it can be written to.

    Attributes:
        head: Newest commit of the branch.
        notes: Sentences that the user should read.
    """

    head: str
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Account:
    """Who the token belongs to and what it may do, as far as the Hub says.

    Attributes:
        name: Name of the user.
        roles: Role of the user in each of their organizations, by name; None where the Hub does not say.
        token_name: Name of the token.
        token_role: Role of the token; None where the Hub does not say.
        granted: Rights of a fine-grained token everywhere.
        scopes: Users, organizations or repositories, each with the rights of a fine-grained token there.
    """

    name: str
    roles: Mapping[str, str | None]
    token_name: str
    token_role: str | None
    granted: tuple[str, ...]
    scopes: tuple[tuple[str | None, tuple[str, ...]], ...]

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Return the names of the user and of their organizations."""
        return (self.name, *self.roles)

    def granted_on(self, *names: str) -> tuple[str, ...]:
        """Return the rights of a fine-grained token everywhere and on what has one of these names."""
        return (*self.granted, *(right for name, rights in self.scopes if name in names for right in rights))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read the answer of the Hub's whoami."""
        token = content.get("auth", {}).get("accessToken", {})
        fine_grained = token.get("fineGrained") or {}
        return cls(
            name=content["name"],
            roles={organization["name"]: organization.get("roleInOrg") for organization in content.get("orgs", ())},
            token_name=token.get("displayName", ""),
            token_role=token.get("role"),
            granted=tuple(fine_grained.get("global") or ()),
            scopes=tuple(
                ((scope.get("entity") or {}).get("name"), tuple(scope.get("permissions") or ()))
                for scope in fine_grained.get("scoped") or ()
            ),
        )


def preflight(writer: HubWriter, weights: Collection[str], base: BaseModel, card: huggingface_hub.ModelCard) -> Ready:
    """Find out whether the model can be published, and make the repository and the branch where they do not exist.

    Args:
        writer: Writer of the repository.
        weights: Names of the shards that the model will have.
        base: Description of the model that is quantized.
        card: Card whose metadata the Hub checks.

    Returns:
        The state of the repository.

    Raises:
        ConfigError: The model cannot be published there.
        RunError: The model cannot be published now: the Hub cannot be reached, or does not answer as it should.
    """
    target, place = writer.target, f"publish.repo {writer.repository}"
    try:
        validate_repo_id(writer.repository)
        _require_token(place)
        account = _Account.from_json(writer.patiently("asking who the token belongs to", writer.api.whoami))
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
    visibility = "private" if info.private else "public"
    destination = f"{writer.repository} ({visibility}), {_where(writer)}"
    note = f"the result goes to {destination}, with the token of {account.name}"
    return Ready(str(info.sha), (note, *base.notes(bool(info.private))))


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


def _require_rights(account: _Account, repository: str, as_pull_request: bool, place: str) -> None:
    """Require the right to write, as far as the Hub says who has it; what it does not say, it refuses later."""
    namespace = repository.partition("/")[0]
    if not as_pull_request and namespace not in account.namespaces:
        raise ConfigError(
            f"{place}: the token belongs to {account.name}, who is no member of {namespace}; it has "
            f"{', '.join(account.namespaces)}"
        )
    if not as_pull_request and account.roles.get(namespace) == "read":
        raise ConfigError(f"{place}: {account.name} may only read in {namespace}; ask for the role of a contributor")
    role = account.token_role
    if role == "fineGrained":
        _require_scope(account, repository, ("repo", "discussion") if as_pull_request else ("repo",), place)
    elif role is not None and role not in _WRITING:
        raise ConfigError(
            f"{place}: the token {account.token_name!r} may only {role}; make one that may write at "
            "https://huggingface.co/settings/tokens"
        )


def _require_scope(account: _Account, repository: str, rights: tuple[str, ...], place: str) -> None:
    namespace = repository.partition("/")[0]
    granted = account.granted_on(namespace, repository)
    if not any(right.startswith(rights) and right.endswith("write") for right in granted):
        raise ConfigError(
            f"{place}: the fine-grained token grants no write access to repositories of {namespace}; add it at "
            "https://huggingface.co/settings/tokens"
        )


def _require_fit(info: huggingface_hub.ModelInfo, private: bool, weights: Collection[str], place: str) -> None:
    """Require that what the repository holds already does not make something else of the model."""
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
    """Ask the question that precedes every upload: it changes nothing, and the Hub answers only who may write."""
    probe = huggingface_hub.CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=b"#\n")
    writer.patiently(
        "asking whether it may be written to",
        lambda: writer.api.preupload_lfs_files(
            writer.repository, [probe], revision=writer.target.revision, create_pr=writer.target.pull_request
        ),
    )
