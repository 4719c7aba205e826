"""Upload of finished shards while a run goes on: one at a time, in a thread of the driver's process."""

import queue
import threading
import time
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any, Self

import tenacity

from astro.errors import StorageError
from astro_dist.export.inventory import ModelFile, shards_of
from astro_dist.publish.hub_client import HubWriter
from astro_dist.publish.upload_record import UploadRecord
from astro_dist.run_directory.records import RunDirectory
from astro_dist.source.backoff import Backoff
from astro_dist.source.hub_errors import HubError, without_secrets

__all__ = ["BackgroundUpload"]

_BACKOFF = Backoff(first_s=5.0, longest_s=300.0)
_PATIENCE_S = 5.0
"""With an upload when the run has failed: the user waits for the reason."""


class BackgroundUpload:
    """Sends what is final and not yet at the Hub. Nothing that it meets stops the run: it is noted, and tried again.

    What it holds in memory is a part of one file.

    Attributes:
        say: tells the user, from any thread.
    """

    def __init__(self, writer: HubWriter, record: UploadRecord, run: RunDirectory, say: Callable[[str], None]) -> None:
        """Nothing is sent before it is entered as a context.

        Args:
            writer: of the repository.
            record: of what it holds.
            run: whose finished units are offered.
            say: tells the user, from any thread.
        """
        self._writer, self._record, self._run, self.say = writer, record, run, say
        self._offered: set[str] = set()
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)

    def offer(self, finished: Collection[str]) -> None:
        """Upload the shards of finished units, but those that were offered before.

        Args:
            finished: names of all units that are finished; one that was found damaged and is made again comes anew.
        """
        for unit in sorted(set(finished) - self._offered):
            self._waiting.put(unit)
        self._offered = set(finished)

    def __enter__(self) -> Self:
        """Upload until the end of the context."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Begin no other upload, and let the one that goes on end; where the run failed, not for long."""
        self._ending.set()
        self._waiting.put(None)
        self._thread.join(None if error is None else _PATIENCE_S)

    def _work(self) -> None:
        """Upload unit by unit until the end; after a failure the next unit waits, whichever it is."""
        retrying = _BACKOFF.retrying(
            lambda error: (
                error.failure.wait_s if isinstance(error, HubError) else 0.0
            ),  # whatever it is, the run goes on
            sleep=tenacity.sleep_using_event(self._ending),
        )
        while retrying(self._upload_next_unit):
            pass

    def _upload_next_unit(self) -> bool:
        """Upload the shards of one unit, and return whether there may be more; a unit that fails is queued again."""
        unit = self._waiting.get()
        if unit is None or self._ending.is_set():
            return False
        try:
            for file in shards_of(self._run, unit):
                self._upload(file)
        except Exception as error:
            self._tell_failure(unit, error)
            self._waiting.put(unit)
            raise
        return True

    def _upload(self, file: ModelFile) -> None:
        if self._ending.is_set() or self._record.holds(file):
            return
        begin = time.perf_counter()
        self._writer.upload([file], self._run.model, attempts=1)
        self._record.add(file)
        self._note(
            "uploaded", file=file.name, size_bytes=file.size_bytes, seconds=round(time.perf_counter() - begin, 2)
        )

    def _tell_failure(self, unit: str, error: Exception) -> None:
        cause = without_secrets(str(error) or type(error).__name__)
        self.say(f"{cause}. The run goes on; it is tried again")
        self._note("upload_failed", unit=unit, cause=cause)

    def _note(self, event: str, **details: Any) -> None:
        try:
            self._run.journal.note(event, **details)
        except StorageError as error:
            self.say(str(error))
