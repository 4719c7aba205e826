"""What a run will need, before anything starts: memory, disk, traffic, time."""

import dataclasses
import shutil
from pathlib import Path

import torch
from rich.filesize import decimal

from astro.errors import ConfigError
from astro_dist.config.schema import RunConfig
from astro_dist.planning.cost import CostModel
from astro_dist.planning.devices import Device
from astro_dist.planning.disk_size import DiskSize
from astro_dist.planning.planned_run import PlannedRun
from astro_dist.planning.simulate import simulate
from astro_dist.planning.units import Plan
from astro_dist.schedule.calls import Call
from astro_dist.schedule.factory import schedule_of
from astro_dist.schedule.schedule import RunShape
from astro_dist.source.calibration_text import chunk_tokens

__all__ = ["Estimate", "estimate", "require_room"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run needs on workers that are all alike.

    Attributes:
        workers: Number of workers.
        workers_at_once: Number of workers that the time is counted with: no more than a single machine has cores for.
        device: Name of the device that each worker has.
        worker_bytes: Peak memory of a worker; on a GPU an upper bound for the device.
        host_bytes: Peak memory that a worker on a GPU takes of its host; 0 on CPUs, where it is `worker_bytes`.
        disk_bytes: Bytes that the run directory takes at most.
        moved_bytes: Bytes that all workers read and write, over the network where the folders are elsewhere.
        wall_s: Seconds from the first call to the end of the last, once the workers are up.
        device_hours: Hours of all workers together, idle time included.
        efficiency: Share of the workers' time in which they have something to do.
        by_verb_s: Seconds of all workers by what they do.
    """

    workers: int
    workers_at_once: int
    device: str
    worker_bytes: int
    host_bytes: int
    disk_bytes: int
    moved_bytes: int
    wall_s: float
    device_hours: float
    efficiency: float
    by_verb_s: dict[str, float]


def estimate(
    config: RunConfig, plan: Plan, dtype: torch.dtype, workers: int, device: Device, at_once: int | None = None
) -> Estimate:
    """Estimate what a run needs by simulating it.

    Args:
        config: Configuration of the run.
        plan: Units of the run.
        dtype: Dtype of forward passes.
        workers: Number of workers.
        device: Device that each worker has.
        at_once: Number of workers for which there are cores; None where there are enough for all.

    Returns:
        The estimate.
    """
    at_once = min(workers, at_once or workers)
    tokens = chunk_tokens(config.calibration)
    device_type = "cuda" if device.memory_bytes else "cpu"
    planned = PlannedRun(plan, config, tokens, dtype, device_type)
    cost = CostModel(planned)
    moved = [0.0]

    def seconds(call: Call) -> float:
        moved[0] += cost.work(call).moved_bytes
        return cost.seconds(call, device)

    schedule = schedule_of(config, RunShape(len(plan.blocks), len(plan.copies), list(tokens)))
    simulated = simulate(schedule, at_once, seconds, cost.result)
    return Estimate(
        workers=workers,
        workers_at_once=at_once,
        device=device.name,
        worker_bytes=cost.worker_bytes(),
        host_bytes=cost.host_bytes() if device.memory_bytes else 0,
        disk_bytes=DiskSize(planned).most_bytes(workers),
        moved_bytes=int(moved[0]),
        wall_s=simulated.wall_s,
        device_hours=at_once * simulated.wall_s / 3600,
        efficiency=simulated.efficiency(at_once),
        by_verb_s=simulated.by_verb,
    )


def require_room(needed_bytes: int, folder: Path, key: str = "output.dir") -> None:
    """Refuse a run that does not fit on the disk of its directory.

    Args:
        needed_bytes: Bytes that the run takes on the disk at most.
        folder: Run directory, or folder of its activations, which need not exist yet.
        key: Key of the configuration that names the folder.

    Raises:
        ConfigError: The disk has too little space; the message says what would help.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise ConfigError(
            f"{key} {folder}: the run needs about {decimal(needed_bytes)} there, which is "
            f"{decimal(needed_bytes - free)} more than is free; free space, choose another folder, or lower "
            "calibration.samples"
        )
