"""Upload finished shards while a run goes on, one at a time, in a thread of the driver's process."""

import queue
import threading
import time
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any, Self

import tenacity

from astro.errors import StorageError
from astro_dist.export.inventory import shards_of
from astro_dist.publish.hub_client import HubWriter
from astro_dist.publish.upload_record import UploadRecord
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.unit_record import FileRecord
from astro_dist.source.backoff import Backoff
from astro_dist.source.hub_errors import HubError, without_secrets

__all__ = ["BackgroundUpload"]

_BACKOFF = Backoff(first_s=5.0, longest_s=300.0)
_PATIENCE_S = 5.0
"""Seconds that a running upload may still take after the run has failed: the user waits for the reason."""


class BackgroundUpload:
    """A background upload sends what is final and not yet at the Hub.

    No failure of an upload stops the run: it is noted in the journal, and the upload is tried again. Only a part of
    one file is in memory at a time.

    Attributes:
        say: Function that tells the user something, from any thread.
    """

    def __init__(self, writer: HubWriter, record: UploadRecord, run: RunDirectory, say: Callable[[str], None]) -> None:
        """Prepare the upload; nothing is sent before it is entered as a context.

        Args:
            writer: Writer of the repository.
            record: Record of what the repository holds.
            run: Run directory whose finished units are offered.
            say: Function that tells the user something, from any thread.
        """
        self._writer, self._record, self._run, self.say = writer, record, run, say
        self._offered: set[str] = set()
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)

    def offer(self, finished: Collection[str]) -> None:
        """Queue the shards of all finished units that the last call did not name.

        Args:
            finished: Names of all units that are finished. A damaged unit is missing here until it is done again.
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
        """Begin no other upload, and wait for the running one; where the run failed, wait only a few seconds."""
        self._ending.set()
        self._waiting.put(None)
        self._thread.join(None if error is None else _PATIENCE_S)

    def _work(self) -> None:
        """Upload unit by unit until the end. A failure delays the next unit, whichever it is."""
        retrying = _BACKOFF.retrying(_asked_wait_s, sleep=tenacity.sleep_using_event(self._ending))
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

    def _upload(self, file: FileRecord) -> None:
        if self._ending.is_set() or self._record.holds(file):
            return
        begin = time.perf_counter()
        self._writer.upload([file], self._run.model, attempts=1)
        self._record.add(file)
        seconds = round(time.perf_counter() - begin, 2)
        self._note("uploaded", file=file.name, size_bytes=file.size_bytes, seconds=seconds)

    def _tell_failure(self, unit: str, error: Exception) -> None:
        cause = without_secrets(str(error) or type(error).__name__)
        self.say(f"{cause}. The run goes on; it is tried again")
        self._note("upload_failed", unit=unit, cause=cause)

    def _note(self, event: str, **details: Any) -> None:
        try:
            self._run.journal.note(event, **details)
        except StorageError as error:
            self.say(str(error))


def _asked_wait_s(error: Exception) -> float:
    """Return the seconds that the Hub asks to wait. Every error is tried again, because the run goes on anyway."""
    return error.failure.wait_s if isinstance(error, HubError) else 0.0
