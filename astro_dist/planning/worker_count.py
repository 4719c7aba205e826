"""How many workers `execution.workers: auto` stands for: one rule for those who start them and those who foretell."""

import os
from collections.abc import Iterable, Mapping

import torch

from astro.errors import ConfigError
from astro_dist.config.execution import ExecutionConfig

__all__ = ["count_note", "foretold_workers", "local_workers", "machine_cpus", "places"]


def places(nodes: Iterable[Mapping[str, float]], threads: int, has_gpus: bool) -> int:
    """Return the number of workers that nodes have room for while nothing else runs on them.

    Args:
        nodes: Resources of each node, `CPU` and `GPU`, as Ray counts them.
        threads: Number of CPUs that a worker asks for.
        has_gpus: Whether each worker has a GPU too.
    """
    total = 0
    for node in nodes:
        by_cpus = int(node.get("CPU", 0)) // threads
        total += min(by_cpus, int(node.get("GPU", 0))) if has_gpus else by_cpus
    return total


def local_workers(execution: ExecutionConfig) -> int:
    """Return the number of workers of the local executor, which computes with one of them at a time.

    Args:
        execution: Configuration of workers and cluster.
    """
    return execution.workers if isinstance(execution.workers, int) else 1


def machine_cpus(execution: ExecutionConfig) -> int:
    """Return the number of CPUs that a private cluster has: this machine's, or as many as its workers ask for.

    Args:
        execution: Configuration of workers and cluster.
    """
    asked = execution.workers * execution.cpu_threads if isinstance(execution.workers, int) else 0
    return max(os.cpu_count() or 1, asked)


def foretold_workers(execution: ExecutionConfig, has_gpus: bool) -> int:
    """Return how many workers a run will start, or 1 where only its cluster will tell.

    Args:
        execution: Configuration of workers and cluster.
        has_gpus: Whether each worker has a GPU.

    Raises:
        ConfigError: This machine has too few CPUs for one worker.
    """
    return _known_workers(execution, has_gpus) or 1


def count_note(execution: ExecutionConfig, has_gpus: bool) -> str | None:
    """Say that a run may start more than the one worker that is planned for; None where it will not.

    Args:
        execution: Configuration of workers and cluster.
        has_gpus: Whether each worker has a GPU.
    """
    if _known_workers(execution, has_gpus) is not None:
        return None
    return "planned for one worker; execution.workers: auto takes all that the cluster has room for (--workers N)"


def _known_workers(execution: ExecutionConfig, has_gpus: bool) -> int | None:
    """Return how many workers a run will start; None where only its cluster will tell."""
    if isinstance(execution.workers, int):
        return execution.workers
    if execution.executor == "local":
        return local_workers(execution)
    gpus = torch.cuda.device_count() if has_gpus else 0
    if execution.cluster_address is not None or (has_gpus and not gpus):
        return None
    cpus = machine_cpus(execution)
    count = places([{"CPU": cpus, "GPU": gpus}], execution.cpu_threads, has_gpus)
    if not count:
        raise ConfigError(
            f"execution.threads_per_worker: {execution.cpu_threads}, but this machine has {cpus} CPUs, not enough for "
            "one worker; lower it, or give a number of workers"
        )
    return count
