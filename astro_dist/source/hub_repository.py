"""Read files of a Hugging Face Hub repository at one commit."""

import dataclasses
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from astro.errors import CheckpointError, ConfigError
from astro_dist.config.model_place import likely_place
from astro_dist.source.hub_errors import PASSING, asked_wait_s, without_secrets
from astro_dist.source.remote_store import Passing, without_query

__all__ = ["HubFiles", "open_hub"]

_TIMEOUT_S = 60.0
_LINKS: dict[tuple[str, str, str], str] = {}
"""Links to which the Hub redirected this process, by repository, commit and file, kept until they expire: the Hub
limits how often it is asked."""


@dataclasses.dataclass(frozen=True)
class HubFiles:
    """Hub files belong to a repository of the Hugging Face Hub at one commit.

    Attributes:
        repository: ORG/NAME of the repository.
        commit: Hash of the commit.
        files: Name and size in bytes of every file.
        gated: Whether access to the repository has to be asked for.
    """

    repository: str
    commit: str
    files: tuple[tuple[str, int], ...]
    gated: bool = False

    def __str__(self) -> str:
        return f"{self.repository}@{self.commit[:12]}"

    @property
    def revision(self) -> str:
        """Return the commit."""
        return self.commit

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file at the root of the repository, by name."""
        return {name: size for name, size in self.files if "/" not in name}

    def every_size(self) -> dict[str, int]:
        """Return the size in bytes of every file of the repository, by its path."""
        return dict(self.files)

    def fetch(self, file: str, start: int, length: int) -> bytes:
        """Fetch some bytes of a file, fewer than asked for where the connection ends early.

        Args:
            file: Name of the file.
            start: Offset of the first byte.
            length: Number of bytes.

        Raises:
            Passing: The request may work later.
            CheckpointError: The Hub refuses, or sends something else than the file.
        """
        key = (self.repository, self.commit, file)
        link = _LINKS.get(key)
        url = link or huggingface_hub.hf_hub_url(self.repository, file, revision=self.commit)
        asked = f"bytes {start}-{start + length - 1}/{self.every_size()[file]}"
        # Not compressed: a range of a compressed form would be other bytes.
        headers = {
            **build_hf_headers(), "Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity",
        }  # fmt: skip
        if link:  # the store behind the Hub gets no token
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        content = bytearray()
        try:
            with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True) as answer:
                if link and answer.status_code >= 400 and answer.status_code not in PASSING:
                    raise Passing(f"a link that the Hub gave may have expired: the store answers {answer.status_code}")
                self._require_range(file, answer, asked)
                if answer.history and answer.url.host != answer.history[0].url.host:
                    _LINKS[key] = str(answer.url)
                for part in answer.iter_raw():
                    content += part
                    if len(content) >= length:
                        break
        except (CheckpointError, Passing):
            _forget(key, link)
            raise
        except hub_errors.OfflineModeIsEnabled as error:
            raise CheckpointError(f"{self}: {error}") from error
        except Exception as error:  # of whichever HTTP library huggingface_hub is built on
            _forget(key, link)
            if not content:
                raise Passing(f"{type(error).__name__}: {without_query(str(error))}") from error
        return bytes(content[:length])

    def _require_range(self, file: str, answer: Any, asked: str) -> None:
        """Refuse any answer but the range that was asked for, before its content is read."""
        status = answer.status_code
        if status in PASSING:
            raise Passing(f"the Hub answers {status}", asked_wait_s(answer.headers))
        if status >= 400:
            answer.read()
            try:
                hf_raise_for_status(answer)
            except hub_errors.HfHubHTTPError as error:
                raise _refused(self.repository, self.commit, error) from error
        if status != 206:  # it would send the whole file each time
            raise CheckpointError(f"{self}/{file}: the server does not send byte ranges (it answers {status})")
        got = answer.headers.get("Content-Range")
        if got != asked or answer.headers.get("Content-Encoding", "identity") != "identity":
            raise CheckpointError(f"{self}/{file}: asked for {asked}, the server sends {got}; the file is another one")


def _forget(key: tuple[str, str, str], link: str | None) -> None:
    """Drop a link that did not work, unless another thread has stored a new one already."""
    if link is not None and _LINKS.get(key) == link:
        _LINKS.pop(key, None)


def open_hub(repository: str, revision: str) -> HubFiles:
    """Find the commit that a branch, tag or commit of a Hub repository is at, and its files.

    Args:
        repository: ORG/NAME of the repository.
        revision: Branch, tag or commit.

    Raises:
        ConfigError: The Hub does not allow such a name.
        CheckpointError: The repository or revision is missing, gated or cannot be reached; the message says why.
    """
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
    except hub_errors.HFValidationError as error:
        raise ConfigError(f"{repository}: {error}") from error
    except hub_errors.HfHubHTTPError as error:
        raise _refused(repository, revision, error) from error
    except hub_errors.OfflineModeIsEnabled as error:
        raise CheckpointError(
            f"{repository}: no such folder here{likely_place(repository)}, and the Hub is not asked: HF_HUB_OFFLINE is "
            "set"
        ) from error
    except Exception as error:  # of whichever HTTP library huggingface_hub is built on
        raise CheckpointError(
            f"{repository}: no such folder here{likely_place(repository)}, and the Hub cannot be reached: "
            f"{type(error).__name__}: {without_secrets(str(error))}; correct the name, or see to the network (a "
            "proxy, HF_ENDPOINT)"
        ) from error
    files = tuple((file.rfilename, int(file.size or 0)) for file in info.siblings or ())
    return HubFiles(repository, str(info.sha), files, bool(info.gated))


def _refused(repository: str, revision: str, error: hub_errors.HfHubHTTPError) -> CheckpointError:
    """Make the error that tells what the Hub says and what to do."""
    reason = error.server_message or without_query(" ".join(str(error).split()))
    if isinstance(error, hub_errors.GatedRepoError):
        advice = (
            f"ask for access at https://huggingface.co/{repository}, then give every machine a token that has it "
            "(HF_TOKEN or `hf auth login`)"
        )
    elif isinstance(error, hub_errors.RevisionNotFoundError):
        advice = f"it has no branch, tag or commit {revision!r}; correct the revision"
    elif isinstance(error, hub_errors.RepositoryNotFoundError):
        advice = (
            f"there is no such folder here either{likely_place(repository)}; correct the name, or give a token where "
            "it is private"
        )
    else:
        advice = "see https://status.huggingface.co, or give a valid token"
    return CheckpointError(f"{repository}: the Hub refuses: {reason}; {advice}")
