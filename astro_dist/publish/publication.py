"""Publish a finished model on the Hub: upload what is missing, have all of it confirmed, make one visible commit.

A commit whose answer was lost may have been made nevertheless. Before it is tried again, the repository is looked at,
and the Hub is told which commit the new one must follow. So at most one commit is made.
"""

import dataclasses
import importlib.util
import shlex
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import huggingface_hub

from astro.errors import AstroError, ConfigError, DamagedError, RunError
from astro.storage.atomic import write_json
from astro_dist.config.schema import PublishConfig
from astro_dist.console import say
from astro_dist.export.finished_run import FinishedRun
from astro_dist.export.inventory import CARD_NAME, damaged_files, read_inventory, replace_card
from astro_dist.publish.background_upload import BackgroundUpload
from astro_dist.publish.hub_client import HubWriter, different
from astro_dist.publish.preflight import preflight
from astro_dist.publish.upload_record import UploadRecord
from astro_dist.run_directory.published_model import PublishedModel
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.summary import Summary
from astro_dist.run_directory.unit_record import FileRecord
from astro_dist.source.hub_errors import HubError
from astro_dist.source.model_info import BaseModel

__all__ = ["Publication", "publish_run"]

_ATTEMPTS = 5
_LAST_LOOK_S = 32.0
"""Seconds until the repository is looked at once more, because the Hub may still be making the commit."""
_ALWAYS_LARGE_BYTES = 10_000_000
"""Size above which the Hub keeps no file as plain text in git, whatever its name."""


@dataclasses.dataclass(frozen=True)
class _Commit:
    """A commit that holds the model.

    Attributes:
        revision: Branch, or reference of the pull request, that the commit is on.
        sha: Hash of the commit.
    """

    revision: str
    sha: str


class Publication:
    """A publication takes the result of one run to one place."""

    def __init__(self, run: RunDirectory, target: PublishConfig) -> None:
        """Prepare the publication; nothing is asked yet.

        Args:
            run: Run directory, which need not exist yet.
            target: Section of the configuration that says where to publish; its `repo` is set.
        """
        self._run, self._target = run, target
        self._writer = HubWriter(target)
        where = "pull request" if target.pull_request else self._writer.branch
        self._record = UploadRecord(run.uploads, f"{self._writer.repository}@{where}")
        self._parent = ""

    def prepare(self, weights: Collection[str], base: BaseModel, card: huggingface_hub.ModelCard) -> tuple[str, ...]:
        """Check everything that can be checked before a byte is sent, and note the newest commit of the repository.

        Args:
            weights: Names of the model's shards.
            base: Description of the model that is quantized.
            card: Card of the model, or only its metadata where the card is not written yet.

        Returns:
            Sentences that the user should read.

        Raises:
            ConfigError: The model cannot be published there.
            RunError: The Hub cannot be reached, or does not answer as it should.
        """
        ready = preflight(self._writer, weights, base, card)
        self._parent = ready.head
        return ready.notes

    def in_background(self) -> BackgroundUpload:
        """Make the upload of shards while the run goes on, to be entered as a context."""
        return BackgroundUpload(self._writer, self._record, self._run, say)

    def finish(self) -> Summary:
        """Publish the finished model.

        Returns:
            The summary of the run, which says where the model is.

        Raises:
            RunError: The model could not be published. The message says how to go on; the Hub keeps what it holds.
        """
        finished = FinishedRun.open(self._run.root)
        try:
            self._write_card(finished)
            published = self._publish(finished.title)
        except AstroError as error:
            self._run.journal.note("publish_failed", cause=str(error))
            again = "`astro-dist quantize` makes it anew" if isinstance(error, DamagedError) else self._command()
            raise RunError(f"{error}. The run itself is finished in {self._run.root}. To go on: {again}") from error
        self._run.journal.note("published", **published.to_json())
        summary = dataclasses.replace(finished.summary, publish=published)
        write_json(self._run.summary, summary.to_json())
        return summary

    def _write_card(self, finished: FinishedRun) -> None:
        """Write the card anew where it is not the one that this version writes for the repository."""
        card = str(finished.card(self._writer.repository))
        path = self._run.model / CARD_NAME
        if not path.is_file() or path.read_bytes() != card.encode():
            replace_card(self._run, card)

    def _publish(self, title: str) -> PublishedModel:
        begin, writer, folder = time.perf_counter(), self._writer, self._run.model
        files = read_inventory(self._run)
        commit = self._find(files, title)
        if commit is None:
            self._upload(files)
            commit = self._commit(files, title)
        wrong = different(writer.listing(commit.sha), files, folder)
        if wrong:
            raise RunError(
                f"{writer.repository}@{commit.sha[:12]}: the commit was made, but {len(wrong)} files in it are not "
                f"those of {folder}, the first is {wrong[0]}; look at the repository"
            )
        published = PublishedModel(
            repository=writer.repository,
            revision=commit.revision,
            commit=commit.sha,
            num_files=len(files),
            size_bytes=sum(file.size_bytes for file in files),
            seconds=round(time.perf_counter() - begin, 2),
            url=f"{writer.api.endpoint}/{writer.repository}/tree/{commit.revision}",
        )
        self._record.commit(files, published)
        return published

    def _find(self, files: Sequence[FileRecord], title: str) -> _Commit | None:
        """Find a commit that holds exactly these files already."""
        writer = self._writer
        revisions = writer.pull_requests(title) if self._target.pull_request else [writer.branch]
        for revision in revisions:
            sha = writer.head(revision)
            if not different(writer.listing(sha), files, self._run.model):
                return _Commit(revision, sha)
        return None

    def _upload(self, files: Sequence[FileRecord]) -> None:
        """Upload what the Hub does not hold, until it has confirmed size and SHA-256 of every large file."""
        writer, folder = self._writer, self._run.model
        large = [file for file in files if _is_large(file)]
        self._send([file for file in large if not self._record.holds(file)])
        missing = writer.missing(large)  # the record may be older than what the Hub keeps
        self._record.forget(missing)
        self._send(missing)
        # Xet has checked what it was sent; the Hub does not say whether it finds that by SHA-256 before the commit.
        if missing and not _uses_xet() and writer.missing(missing):
            raise RunError(
                f"{writer.repository}: the Hub took {missing[0].name} and says that it does not hold its SHA-256 "
                f"{missing[0].sha256}"
            )
        writer.upload([file for file in files if not _is_large(file)], folder)

    def _send(self, files: Sequence[FileRecord]) -> None:
        for file in files:
            begin = time.perf_counter()
            self._writer.upload([file], self._run.model)
            self._record.add(file)
            seconds = time.perf_counter() - begin
            self._run.journal.note("uploaded", file=file.name, size_bytes=file.size_bytes, seconds=round(seconds, 2))
            say(f"uploaded {file.name}, {file.size_bytes / 1e6:.0f} MB in {seconds:.0f} s")

    def _commit(self, files: Sequence[FileRecord], title: str) -> _Commit:
        """Make the one commit; before every attempt, look whether an earlier one has made it."""
        writer = self._writer

        def attempt() -> _Commit:
            if made := self._made(files, title):
                return made
            answer = writer.commit(files, self._run.model, self._parent, title)
            return _Commit(answer.pr_revision or writer.branch, answer.oid)

        try:
            return writer.patiently("making the commit", attempt, _ATTEMPTS)
        except HubError as error:
            if error.failure.passes:
                time.sleep(_LAST_LOOK_S)
            if made := self._made(files, title):
                return made
            raise

    def _made(self, files: Sequence[FileRecord], title: str) -> _Commit | None:
        """Find the commit whose answer was lost, or one that another publisher made of the same model.

        Returns:
            The commit; None where it is still to be made.

        Raises:
            RunError: Someone else has committed to the branch. A pull request does not mind what the branch is at.
        """
        head = self._parent if self._target.pull_request else self._writer.head()
        if head == self._parent and not self._target.pull_request:
            return None
        commit = self._find(files, title)
        if commit is None and head != self._parent:
            raise RunError(
                f"{self._writer.repository}: {self._writer.branch} was at {self._parent[:12]}, is at {head[:12]} now: "
                "someone else has committed there. Nothing was changed; look at it, publishing again goes on from there"
            )
        return commit

    def _command(self) -> str:
        """Return the command that publishes this run to the same place."""
        target = self._target
        flags = ["--revision", target.revision] if target.revision else []
        flags += ["--pull-request"] * target.pull_request + ["--public"] * (not target.private)
        return shlex.join(["astro-dist", "publish", str(self._run.root), "--repo", str(target.repo), *flags])


def publish_run(root: Path, target: PublishConfig) -> PublishedModel:
    """Publish a finished run, or go on with a publication that was interrupted.

    Args:
        root: Folder of the run directory.
        target: Section of the configuration that says where to publish; its `repo` is set.

    Returns:
        Where the model is.

    Raises:
        ConfigError: There is no finished run, or the repository cannot be written to; nothing was sent.
        RunError: The model could not be published. The message says how to go on; the Hub keeps what it holds.
    """
    root = root.expanduser().absolute()
    finished = FinishedRun.open(root)
    with finished.run.locked():
        if damaged := damaged_files(finished.run):
            raise ConfigError(
                f"{root}: {len(damaged)} files of the model are gone or of another size than was written, the first is "
                f"{damaged[0]}; `astro-dist quantize` of the same version makes them anew"
            )
        publication = Publication(finished.run, target)
        weights = [file.name for file in read_inventory(finished.run) if file.name.endswith(".safetensors")]
        for note in publication.prepare(weights, finished.base, finished.card(target.repo)):
            say(note)
        published = publication.finish().publish
    assert published is not None, "finish() publishes, or raises"
    return published


def _is_large(file: FileRecord) -> bool:
    return file.name.endswith(".safetensors") or file.size_bytes > _ALWAYS_LARGE_BYTES


def _uses_xet() -> bool:
    return not huggingface_hub.constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None
