"""Write to one repository of the Hugging Face Hub, by huggingface_hub's own client.

The client itself asks the Hub whether a file goes to Xet or LFS, cuts it into parts and streams them from disk. It
repeats a request for a part five times when the answer is 408, 429, 500, 502, 503 or 504 or the connection fails.
This module repeats every request on top of that; before it repeats the one commit, it looks up whether that happened.
Only the client reads the token; nothing here holds it.
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

from astro.errors import AstroError, DamagedError
from astro_dist.config.schema import PublishConfig
from astro_dist.console import say
from astro_dist.run_directory.unit_record import FileRecord
from astro_dist.source.backoff import Backoff
from astro_dist.source.hub_errors import HubError, HubFailure, failure_of

__all__ = ["HubWriter", "different"]

_ATTEMPTS = 6
_BACKOFF = Backoff(first_s=2.0, longest_s=60.0)
_TIMEOUT_S = 600.0
"""Seconds without a byte in either direction: a store takes minutes to assemble the parts of a large upload."""
_BATCH = 256
"""Number of files that the Hub can be asked about in one request."""

T = TypeVar("T")


class HubWriter:
    """A Hub writer uploads files to one repository and makes commits there.

    Attributes:
        repository: ORG/NAME of the repository.
        target: Section of the configuration that says where to publish.
        api: Client of huggingface_hub.
    """

    def __init__(self, target: PublishConfig) -> None:
        """Prepare the client; nothing is asked yet.

        Args:
            target: Section of the configuration that says where to publish; its `repo` is set.
        """
        self.repository = str(target.repo)
        self.target = target
        self.api = huggingface_hub.HfApi()
        self._additions: dict[str, huggingface_hub.CommitOperationAdd] = {}
        # Its warnings quote signed links, its bars overwrite the run's display; what happened is told by the run.
        huggingface_hub.logging.set_verbosity(logging.ERROR)
        huggingface_hub.utils.disable_progress_bars()

    @property
    def branch(self) -> str:
        """Return the branch that is committed to, or against which a pull request is made."""
        return self.target.revision or "main"

    def patiently(self, purpose: str, call: Callable[[], T], attempts: int = _ATTEMPTS) -> T:
        """Make a request that may be repeated, until it works.

        Args:
            purpose: Purpose of the request ("making the branch x"), for the messages.
            call: Function that makes the request.
            attempts: Number of attempts after which to give up.

        Returns:
            The answer of `call`.

        Raises:
            HubError: The request cannot work, or failed at every attempt.
        """

        def attempt() -> T:
            # The client waits for ever otherwise; after a lost connection it makes itself a new session.
            huggingface_hub.get_session().timeout = _TIMEOUT_S
            return call()

        def tell(error: Exception, attempt_number: int) -> None:
            if attempt_number == 1:
                say(f"{self.repository}: {purpose}: {failure_of(error)}; trying again")

        retrying = dataclasses.replace(_BACKOFF, attempts=attempts).retrying(_asked_wait_s, tell)
        try:
            return retrying(attempt)
        except AstroError:
            raise
        except Exception as error:  # of huggingface_hub, its HTTP library and hf_xet
            raise self.error(purpose, failure_of(error), retrying.statistics["attempt_number"]) from error

    def error(self, purpose: str, failure: HubFailure, attempts: int = 1) -> HubError:
        """Make the error of a request that failed.

        Args:
            purpose: Purpose of the request, for the message.
            failure: Failure of the last attempt.
            attempts: Number of attempts that were made.
        """
        often = f" (tried {attempts} times)" if attempts > 1 else ""
        return HubError(f"{self.repository}: {purpose}: {failure}{often}", failure)

    def upload(self, files: Sequence[FileRecord], folder: Path, attempts: int = _ATTEMPTS) -> None:
        """Upload all of these files that the Hub does not keep as plain text; the repository does not change yet.

        Args:
            files: Files as they were written.
            folder: Folder of the files.
            attempts: Number of attempts after which to give up.

        Raises:
            DamagedError: A file is not as it was written.
            HubError: The Hub does not take the files.
        """
        additions = [self._addition(file, folder) for file in files]
        names = files[0].name if len(files) == 1 else f"{len(files)} files"
        self.patiently(
            f"uploading {names}",
            lambda: self.api.preupload_lfs_files(
                self.repository, additions, revision=self.target.revision, create_pr=self.target.pull_request,
                free_memory=False, num_threads=1,
            ),
            attempts,
        )  # fmt: skip

    def missing(self, files: Sequence[FileRecord]) -> list[FileRecord]:
        """Return the files of which the Hub does not hold this SHA-256 in this size, ready to be sent again."""
        absent: set[str] = set()
        for start in range(0, len(files), _BATCH):
            infos = [
                UploadInfo(size=file.size_bytes, sha256=bytes.fromhex(file.sha256), sample=b"")
                for file in files[start : start + _BATCH]
            ]
            absent |= self.patiently("asking which files it holds", functools.partial(self._absent, infos))
        missing = [file for file in files if file.sha256 in absent]
        for file in missing:
            self._additions.pop(file.name, None)
        return missing

    def head(self, revision: str | None = None) -> str:
        """Return the newest commit of a revision, or of the branch where `revision` is None."""
        info = self.patiently(
            "asking for its newest commit",
            lambda: self.api.model_info(self.repository, revision=revision or self.branch),
        )
        return str(info.sha)

    def listing(self, revision: str) -> dict[str, RepoFile]:
        """List every file of the repository at a revision, by path."""
        entries = self.patiently(
            f"listing {revision[:12]}",
            lambda: list(self.api.list_repo_tree(self.repository, recursive=True, revision=revision)),
        )
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def pull_requests(self, title: str) -> list[str]:
        """List the revisions of the open pull requests that have a title."""
        requests = self.patiently(
            "listing its pull requests",
            lambda: list(
                self.api.get_repo_discussions(self.repository, discussion_type="pull_request", discussion_status="open")
            ),
        )
        return [f"refs/pr/{request.num}" for request in requests if request.title == title]

    def commit(self, files: Sequence[FileRecord], folder: Path, parent: str, title: str) -> huggingface_hub.CommitInfo:
        """Make one commit of all files, without another attempt.

        The commit may have been made although this raises an error.

        Args:
            files: All files of the model.
            folder: Folder of the files.
            parent: Commit that the branch must be at.
            title: Title of the commit.
        """
        huggingface_hub.get_session().timeout = _TIMEOUT_S
        return self.api.create_commit(
            self.repository, [self._addition(file, folder) for file in files], commit_message=title,
            revision=self.target.revision, create_pr=self.target.pull_request, parent_commit=parent, num_threads=1,
        )  # fmt: skip

    def _absent(self, infos: Iterable[UploadInfo]) -> set[str]:
        answers, errors = post_lfs_batch_info(infos, token=None, repo_type="model", repo_id=self.repository)[:2]
        if errors:
            raise RuntimeError(f"LFS batch API: {errors[0]['error']['message']}")
        return {answer["oid"] for answer in answers if answer.get("actions")}

    def _addition(self, file: FileRecord, folder: Path) -> huggingface_hub.CommitOperationAdd:
        """Compare a file with its record and prepare its upload; a file that was uploaded already is not read again."""
        known = self._additions.get(file.name)
        if known is not None and known.upload_info.sha256.hex() == file.sha256:
            return known
        path = folder / file.name
        if not path.is_file() or path.stat().st_size != file.size_bytes:
            raise DamagedError(path, "is missing, or not of the size in its record; nothing of it is published")
        addition = huggingface_hub.CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=path)
        if addition.upload_info.sha256.hex() != file.sha256:
            raise DamagedError(path, "its SHA-256 is not that of its record; nothing of it is published")
        self._additions[file.name] = addition
        return addition


def different(listing: Mapping[str, RepoFile], files: Iterable[FileRecord], folder: Path) -> list[str]:
    """List the names of the files that a repository does not hold as they are here.

    Args:
        listing: Files of the repository, by path.
        files: Files of the model.
        folder: Folder of the model's files.
    """
    return [file.name for file in files if not _is_same(listing.get(file.name), file, folder)]


def _asked_wait_s(error: Exception) -> float | None:
    """Return the seconds that the Hub asks to wait, or None for what does not pass: our errors are final."""
    failure = None if isinstance(error, AstroError) else failure_of(error)
    return failure.wait_s if failure is not None and failure.passes else None


def _is_same(there: RepoFile | None, file: FileRecord, folder: Path) -> bool:
    if there is None or there.size != file.size_bytes:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == file.sha256)
    content = (folder / file.name).read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return bool(there.blob_id == blob and hashlib.sha256(content).hexdigest() == file.sha256)
