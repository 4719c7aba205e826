"""What a run directory says of its run, while it goes on or after."""

import time
from pathlib import Path
from typing import Any

from astro.quantization.layer_record import fallbacks
from astro_dist.export.inventory import all_shards, damaged_files, read_inventory
from astro_dist.publish.upload_record import read_uploads
from astro_dist.run_directory.identity import read_identity
from astro_dist.run_directory.journal import last_of_each_unit
from astro_dist.run_directory.records import RunDirectory
from astro_dist.schedule.names import is_block_unit

__all__ = ["read_status"]


def read_status(root: Path) -> dict[str, Any]:
    """What is done, in flight and left.

    Args:
        root: the run directory.

    Returns:
        `state` (running, stopped, complete), `damaged` (files of a complete model that are gone or of another size;
        what is in them is not read), `units` and `blocks` with `done` and `total`, `workers` that are up,
        `in_flight` units with their worker and seconds, `retries`, `mended` (units found damaged, to be redone),
        `fallbacks`, `publish` (what each place on the Hub holds), `upload_failures` since the last upload that worked,
        `seconds_left` (None where nothing was finished yet in this session).

    Raises:
        ConfigError: the folder holds no run.
    """
    run = RunDirectory(root, read_identity(root)["key"])
    lines = run.journal.lines()
    opened = [index for index, line in enumerate(lines) if line["event"] == "opened"]
    session = lines[opened[-1] :] if opened else []
    start: dict[str, Any] = next((line for line in reversed(lines) if line["event"] == "started"), {})
    records = {path.stem for path in (root / "records").glob("*.json")}
    blocks = [unit for unit in records if is_block_unit(unit)]
    running = run.is_locked()
    workers, in_flight = _at_work(session if running else [])
    total = start.get("units", len(records))
    complete = run.summary.is_file() and run.inventory.is_file() and len(records) == total
    return {
        "state": "running" if running else "complete" if complete else "stopped",
        "damaged": damaged_files(run) if complete and not running else [],
        "units": {"done": len(records), "total": total},
        "blocks": {"done": len(blocks), "total": start.get("blocks", len(blocks))},
        "workers": workers,
        "in_flight": in_flight,
        "retries": [line for line in lines if line["event"] == "failed"],
        "mended": last_of_each_unit(line for line in lines if line["event"] == "damaged"),
        "fallbacks": fallbacks(layer for unit in blocks for layer in run.read(unit)["layers"]),
        "publish": _published(run),
        "upload_failures": _upload_failures(lines),
        "seconds_left": _seconds_left(session, total - len(records)) if running else None,
    }


def _at_work(session: list[dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
    """Workers that are up, and what they do, by the journal of a session."""
    workers: set[int] = set()
    doing: dict[str, dict[str, Any]] = {}
    for line in session:
        unit, worker = line.get("unit", ""), line.get("worker", -1)
        if line["event"] == "joined":
            workers.add(worker)
        elif line["event"] == "began":
            doing[unit] = {"unit": unit, "worker": worker, "seconds": round(time.time() - line["time"])}
        elif line["event"] in ("finished", "failed"):
            doing.pop(unit, None)
        if line["event"] == "failed":
            workers.discard(worker)
    return len(workers), sorted(doing.values(), key=lambda item: str(item["unit"]))


def _published(run: RunDirectory) -> list[dict[str, Any]]:
    """Files that each place holds, and how many there are: as far as units are finished, while the run goes on."""
    whole = run.inventory.is_file()
    total = len(read_inventory(run)) if whole else len(all_shards(run))
    return [
        {
            "place": place,
            "files": len(own["files"]),
            "total": total,
            "commit": own["committed"]["commit"] if own["committed"] else None,
        }
        for place, own in read_uploads(run.uploads).items()
    ]


def _upload_failures(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ended = [index for index, line in enumerate(lines) if line["event"] in ("uploaded", "published")]
    later = lines[ended[-1] + 1 :] if ended else lines
    return [line for line in later if line["event"] in ("upload_failed", "publish_failed")]


def _seconds_left(session: list[dict[str, Any]], units_left: int) -> float | None:
    finished = sum(line["event"] == "finished" for line in session)
    return (time.time() - session[0]["time"]) / finished * units_left if finished else None
