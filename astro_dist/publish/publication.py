"""A finished model goes to the Hub: what is missing is uploaded, all of it is confirmed, one commit makes it visible.

A commit whose answer was lost may have been made: before it is tried again the repository is looked at, and the Hub
is told which commit it must follow. So there is one or there is none.
"""

import dataclasses
import importlib.util
import shlex
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub

from astro.errors import AstroError, ConfigError, DamagedError, RunError
from astro.storage.atomic import write_json
from astro_dist.config.schema import PublishConfig
from astro_dist.console import say
from astro_dist.export.finished_run import FinishedRun
from astro_dist.export.inventory import CARD_NAME, ModelFile, damaged_files, read_inventory, replace_card
from astro_dist.publish.background_upload import BackgroundUpload
from astro_dist.publish.hub_client import HubWriter, different
from astro_dist.publish.preflight import preflight
from astro_dist.publish.upload_record import UploadRecord
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.summary import Summary
from astro_dist.source.hub_errors import HubError
from astro_dist.source.model_info import BaseModel

__all__ = ["Publication", "publish_run"]

_ATTEMPTS, _LAST_LOOK_S = 5, 32.0
_ALWAYS_LARGE_BYTES = 10_000_000
"""Above this the Hub keeps no file as plain text in git, whatever its name."""


class Publication:
    """One result on its way to one place."""

    def __init__(self, run: RunDirectory, target: PublishConfig) -> None:
        """Nothing is asked yet.

        Args:
            run: the run directory, which need not be there yet.
            target: where to; its `repo` is given.
        """
        self._run, self._target = run, target
        self._writer = HubWriter(target)
        where = "pull request" if target.pull_request else self._writer.branch
        self._record = UploadRecord(run.uploads, f"{self._writer.repository}@{where}")
        self._parent = ""

    def prepare(self, weights: Collection[str], base: BaseModel, card: huggingface_hub.ModelCard) -> tuple[str, ...]:
        """Check everything that can be checked before a byte is sent, and note where the repository is.

        Args:
            weights: names of the model's shards.
            base: what is quantized.
            card: of the model, or its metadata where it is not written yet.

        Returns:
            What the user should know.

        Raises:
            ConfigError: the model cannot be published there.
        """
        ready = preflight(self._writer, weights, base, card)
        self._parent = ready.head
        return ready.notes

    def in_background(self) -> BackgroundUpload:
        """What uploads shards while the run goes on, to be entered as a context."""
        return BackgroundUpload(self._writer, self._record, self._run, say)

    def finish(self) -> Summary:
        """Publish the finished model.

        Returns:
            The summary of the run, with where the model is.

        Raises:
            RunError: it is not published, how to go on; what the Hub holds is kept.
        """
        finished = FinishedRun.open(self._run.root)
        try:
            self._write_card(finished)
            entry = self._publish(finished.title)
        except AstroError as error:
            self._run.journal.note("publish_failed", cause=str(error))
            again = "`astro-dist quantize` makes it anew" if isinstance(error, DamagedError) else self._command()
            raise RunError(f"{error}. The run itself is finished in {self._run.root}. To go on: {again}") from error
        self._run.journal.note("published", **entry)
        summary = dataclasses.replace(finished.summary, publish=entry)
        write_json(self._run.summary, summary.to_json())
        return summary

    def _write_card(self, finished: FinishedRun) -> None:
        """The card names the repository that it is in."""
        card = str(finished.card(self._writer.repository))
        path = self._run.model / CARD_NAME
        if not path.is_file() or path.read_bytes() != card.encode():
            replace_card(self._run, card)

    def _publish(self, title: str) -> dict[str, Any]:
        begin, writer, folder = time.perf_counter(), self._writer, self._run.model
        files = read_inventory(self._run)
        found = self._find(files, title)
        if found is None:
            self._upload(files)
            found = self._commit(files, title)
        revision, commit = found
        wrong = different(writer.listing(commit), files, folder)
        if wrong:
            raise RunError(
                f"{writer.repository}@{commit[:12]}: the commit was made, but {len(wrong)} files in it are not those "
                f"of {folder}, the first is {wrong[0]}; look at the repository"
            )
        entry = {
            "repository": writer.repository, "revision": revision, "commit": commit, "files": len(files),
            "bytes": sum(file.size_bytes for file in files), "seconds": round(time.perf_counter() - begin, 2),
            "url": f"{writer.api.endpoint}/{writer.repository}/tree/{revision}",
        }  # fmt: skip
        self._record.commit(files, entry)
        return entry

    def _find(self, files: Sequence[ModelFile], title: str) -> tuple[str, str] | None:
        """Revision and commit where the repository holds exactly these files already."""
        writer = self._writer
        revisions = writer.pull_requests(title) if self._target.pull_request else [writer.branch]
        for revision in revisions:
            commit = writer.head(revision)
            if not different(writer.listing(commit), files, self._run.model):
                return revision, commit
        return None

    def _upload(self, files: Sequence[ModelFile]) -> None:
        """Upload what the Hub does not hold; at the end it has confirmed size and SHA-256 of every large file."""
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

    def _send(self, files: Sequence[ModelFile]) -> None:
        for file in files:
            begin = time.perf_counter()
            self._writer.upload([file], self._run.model)
            self._record.add(file)
            seconds = time.perf_counter() - begin
            self._run.journal.note("uploaded", file=file.name, size_bytes=file.size_bytes, seconds=round(seconds, 2))
            say(f"uploaded {file.name}, {file.size_bytes / 1e6:.0f} MB in {seconds:.0f} s")

    def _commit(self, files: Sequence[ModelFile], title: str) -> tuple[str, str]:
        """Make the one commit, once; its revision and hash."""
        writer = self._writer

        def attempt() -> tuple[str, str]:
            if made := self._made(files, title):
                return made
            answer = writer.commit(files, self._run.model, self._parent, title)
            return answer.pr_revision or writer.branch, answer.oid

        try:
            return writer.patiently("making the commit", attempt, _ATTEMPTS)
        except HubError as error:
            if error.failure.passes:
                time.sleep(_LAST_LOOK_S)  # it may be making it still
            if made := self._made(files, title):
                return made
            raise

    def _made(self, files: Sequence[ModelFile], title: str) -> tuple[str, str] | None:
        """The commit whose answer was lost, or another publisher's of the same model; None where it can be made.

        Raises:
            RunError: someone else has committed. A pull request stands beside all that.
        """
        head = self._parent if self._target.pull_request else self._writer.head()
        if head == self._parent and not self._target.pull_request:
            return None
        found = self._find(files, title)
        if found is None and head != self._parent:
            raise RunError(
                f"{self._writer.repository}: {self._writer.branch} was at {self._parent[:12]}, is at {head[:12]} now: "
                "someone else has committed there. Nothing was changed; look at it, publishing again goes on from there"
            )
        return found

    def _command(self) -> str:
        target = self._target
        flags = ["--revision", target.revision] if target.revision else []
        flags += ["--pull-request"] * target.pull_request + ["--public"] * (not target.private)
        return shlex.join(["astro-dist", "publish", str(self._run.root), "--repo", str(target.repo), *flags])


def publish_run(root: Path, target: PublishConfig) -> dict[str, Any]:
    """Publish a finished run, or go on with it.

    Args:
        root: the run directory.
        target: where to; its `repo` is given.

    Returns:
        Where the model is: `repository`, `revision`, `commit`, `url`, `files`, `bytes`, `seconds`.

    Raises:
        ConfigError: there is no finished run, or the repository cannot be written to; nothing was sent.
        RunError: it is not published, how to go on; what the Hub holds is kept.
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
        entry = publication.finish().publish
    return dict(entry or {})


def _is_large(file: ModelFile) -> bool:
    return file.name.endswith(".safetensors") or file.size_bytes > _ALWAYS_LARGE_BYTES


def _uses_xet() -> bool:
    return not huggingface_hub.constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None
