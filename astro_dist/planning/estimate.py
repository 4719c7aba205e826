"""What a run will need, before anything starts: memory, disk, traffic, time."""

import dataclasses
import shutil
from pathlib import Path

import torch

from astro.errors import ConfigError
from astro_dist.config.schema import RunConfig
from astro_dist.planning.cost import CostModel
from astro_dist.planning.devices import Device
from astro_dist.planning.simulate import simulate
from astro_dist.planning.units import Plan
from astro_dist.schedule.calls import Call
from astro_dist.schedule.factory import schedule_of
from astro_dist.source.calibration_text import chunk_tokens

__all__ = ["Estimate", "estimate", "require_room"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of a run on workers that are all alike.

    Attributes:
        workers: their number.
        device: their kind.
        worker_bytes: peak memory of one; on a GPU an upper bound for the device.
        disk_bytes: that the run directory takes at most.
        moved_bytes: read and written by all workers together, over the network where the folders are elsewhere.
        wall_s: from the first call to the last, workers being up.
        device_hours: of all workers, idle ones included.
        efficiency: share of that in which they have something to do.
        by_verb_s: seconds of all workers by what they do.
    """

    workers: int
    device: str
    worker_bytes: int
    disk_bytes: int
    moved_bytes: int
    wall_s: float
    device_hours: float
    efficiency: float
    by_verb_s: dict[str, float]


def estimate(config: RunConfig, plan: Plan, dtype: torch.dtype, workers: int, device: Device) -> Estimate:
    """Simulate a run.

    Args:
        config: of the run.
        plan: every unit.
        dtype: of forward passes.
        workers: that all do the same.
        device: what each of them is.
    """
    tokens = chunk_tokens(config.calibration)
    cost = CostModel(plan, config, tokens, dtype.itemsize, "cuda" if device.memory_bytes else "cpu")
    half, moved = dtype.itemsize == 2, [0.0]

    def seconds(call: Call) -> float:
        work = cost.work(call)
        moved[0] += work.moved_bytes
        return work.seconds(device, half)

    schedule = schedule_of(config, len(plan.blocks), len(plan.copies), list(tokens))
    found = simulate(schedule, workers, seconds, cost.result)
    return Estimate(
        workers=workers,
        device=device.name,
        worker_bytes=cost.worker_bytes(),
        disk_bytes=cost.disk_bytes(workers),
        moved_bytes=int(moved[0]),
        wall_s=found.wall_s,
        device_hours=workers * found.wall_s / 3600,
        efficiency=found.efficiency(workers),
        by_verb_s=found.by_verb,
    )


def require_room(needed_bytes: int, folder: Path) -> None:
    """Refuse a run whose directory would not hold it.

    Args:
        needed_bytes: that it takes at most.
        folder: the run directory, or where it will be.

    Raises:
        ConfigError: naming what is short and what would help.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise ConfigError(
            f"output.dir {folder}: the run needs about {needed_bytes / 1e9:.1f} GB there, {free / 1e9:.1f} GB are "
            "free; free space, choose another folder, or lower calibration.samples"
        )
