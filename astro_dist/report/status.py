"""The status of a run, as its directory tells it while the run goes on or afterwards."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from astro.config import Experts
from astro.errors import DamagedError
from astro.quantization.layer_record import Fallbacks
from astro_dist.export.inventory import all_shards, damaged_files, read_inventory
from astro_dist.publish.upload_record import read_uploads
from astro_dist.run_directory.identity import read_identity
from astro_dist.run_directory.journal import (
    Began,
    Damaged,
    Event,
    Failed,
    Finished,
    Foretold,
    Joined,
    Published,
    PublishFailed,
    Started,
    Uploaded,
    UploadFailed,
    last_of_each_unit,
    last_session,
)
from astro_dist.run_directory.records import RunDirectory
from astro_dist.schedule.unit_words import UnitWords

__all__ = ["InFlight", "Place", "Progress", "Status", "read_status"]


@dataclasses.dataclass(frozen=True)
class Progress:
    """Says how much of something is done.

    Attributes:
        done: Number of units or blocks that are finished.
        total: Number of all units or blocks.
    """

    done: int
    total: int


@dataclasses.dataclass(frozen=True)
class InFlight:
    """Says which unit a worker is at.

    Attributes:
        unit: Name of the unit.
        worker: Number of the worker.
        seconds: Time since the unit was begun, in whole seconds.
    """

    unit: str
    worker: int
    seconds: int


@dataclasses.dataclass(frozen=True)
class Place:
    """Says what a place on the Hub holds of the model.

    Attributes:
        place: Name of the repository and the revision.
        files: Number of files that are there.
        total: Number of files that the model has. While the run goes on, only shards of finished units count.
        commit: Hash of the commit that published the model; None before that.
    """

    place: str
    files: int
    total: int
    commit: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """Says what of a run is done, in flight and left.

    Attributes:
        words: What people are told instead of the names of units.
        state: State of the run: "running", "stopped" or "complete".
        damaged: Paths of records that cannot be read, and names of files of a complete model that are gone or have
            another size. The content of those files is not checked.
        units: Number of units that are done, and of all.
        blocks: Number of blocks that are quantized, and of all, over all rounds.
        workers: Number of workers that are up.
        in_flight: Units that workers are at.
        retries: Failures of calls, which were done again or are to be.
        mended: Units that were found damaged, and are done again.
        fallbacks: Layers that could not be quantized just as the configuration asks.
        min_tokens: Number of calibration tokens below which an expert's statistics are not used.
        publish: Places on the Hub, and what they hold.
        upload_failures: Failures since the last upload that worked.
        seconds_left: Time left, in seconds; None where the run does not go on, or too
            little of this session is done to tell.
    """

    words: UnitWords
    state: str
    damaged: tuple[str, ...]
    units: Progress
    blocks: Progress
    workers: int
    in_flight: tuple[InFlight, ...]
    retries: tuple[Failed, ...]
    mended: tuple[Damaged, ...]
    fallbacks: Fallbacks
    min_tokens: int
    publish: tuple[Place, ...]
    upload_failures: tuple[UploadFailed | PublishFailed, ...]
    seconds_left: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the status as a JSON object."""
        plain = dataclasses.asdict(self)
        del plain["words"]
        return {
            **plain,
            "retries": [event.to_json() for event in self.retries],
            "mended": [event.to_json() for event in self.mended],
            "fallbacks": self.fallbacks.to_json(),
            "upload_failures": [event.to_json() for event in self.upload_failures],
        }


def read_status(root: Path) -> Status:
    """Read what of a run is done, in flight and left.

    Args:
        root: Folder of the run directory.

    Raises:
        ConfigError: The folder holds no run.
    """
    identity = read_identity(root)
    run = RunDirectory(root, identity.key)
    events = run.journal.events()
    session = last_session(events)
    start = next((event for event in reversed(events) if isinstance(event, Started)), None)
    recorded = run.recorded_units()
    readable = {record.unit for record in run.readable_records()}
    blocks = run.blocks()
    running = run.is_locked()
    workers, in_flight = _at_work(session if running else ())
    total = start.units if start else len(recorded)
    complete = run.summary.is_file() and run.inventory.is_file() and len(recorded) == total
    lost = [str(run.record(unit).relative_to(root)) for unit in recorded if unit not in readable]
    rounds = identity.arithmetic.get("execution", {}).get("rounds", 1)
    return Status(
        words=UnitWords(start.blocks // rounds if start else 0, rounds),
        state="running" if running else "complete" if complete else "stopped",
        damaged=(*lost, *(_damage(run) if complete and not running else ())),
        units=Progress(len(readable), total),
        blocks=Progress(len(blocks), start.blocks if start else len(blocks)),
        workers=workers,
        in_flight=in_flight,
        retries=tuple(event for event in events if isinstance(event, Failed)),
        mended=last_of_each_unit(event for event in events if isinstance(event, Damaged)),
        fallbacks=Fallbacks.of(layer for block in blocks.values() for layer in block.layers),
        min_tokens=identity.arithmetic.get("experts", {}).get("min_tokens", Experts.min_tokens),
        publish=_published(run),
        upload_failures=_upload_failures(events),
        seconds_left=_seconds_left(session) if running else None,
    )


def _damage(run: RunDirectory) -> list[str]:
    """The files of a complete model that are gone or of another size, or the list of files if that cannot be read."""
    try:
        return damaged_files(run)
    except DamagedError:
        return [run.inventory.name]


def _at_work(session: Sequence[Event]) -> tuple[int, tuple[InFlight, ...]]:
    """The number of workers that are up, and what they do, as the events of a session tell it."""
    workers: set[int] = set()
    doing: dict[str, InFlight] = {}
    for event in session:
        if isinstance(event, Joined):
            workers.add(event.worker)
        elif isinstance(event, Began):
            doing[event.unit] = InFlight(event.unit, event.worker, round(time.time() - event.time))
        elif isinstance(event, Finished | Failed):
            doing.pop(event.unit, None)
        if isinstance(event, Failed):
            workers.discard(event.worker)
    return len(workers), tuple(sorted(doing.values(), key=lambda item: item.unit))


def _published(run: RunDirectory) -> tuple[Place, ...]:
    """What each place on the Hub holds of the model's files, or of the shards so far while the run goes on."""
    try:
        total = len(read_inventory(run)) if run.inventory.is_file() else len(all_shards(run))
    except DamagedError:
        total = len(all_shards(run))
    return tuple(
        Place(name, len(uploads.files), total, uploads.published.commit if uploads.published else None)
        for name, uploads in read_uploads(run.uploads).items()
    )


def _upload_failures(events: Sequence[Event]) -> tuple[UploadFailed | PublishFailed, ...]:
    ended = [index for index, event in enumerate(events) if isinstance(event, Uploaded | Published)]
    later = events[ended[-1] + 1 :] if ended else events
    return tuple(event for event in later if isinstance(event, UploadFailed | PublishFailed))


def _seconds_left(session: Sequence[Event]) -> float | None:
    """What the display of the session shows, counted on to this moment."""
    last = next((event for event in reversed(session) if isinstance(event, Foretold)), None)
    return None if last is None else max(last.time + last.seconds_left - time.time(), 0.0)
