"""How many workers `execution.workers: auto` stands for: one rule for those who start them and those who foretell."""

import os
from collections.abc import Iterable, Mapping

from astro.errors import ConfigError
from astro_dist.config.execution import ExecutionConfig

__all__ = ["count_note", "foretold_workers", "gpus_here", "local_workers", "machine_cpus", "places", "runs_here"]


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


def runs_here(execution: ExecutionConfig, has_gpus: bool) -> bool:
    """Tell whether the workers are this machine's CPUs, so that it is known here how many `auto` stands for.

    Args:
        execution: Configuration of workers and cluster.
        has_gpus: Whether each worker has a GPU.
    """
    return not has_gpus and execution.cluster_address is None


def gpus_here(execution: ExecutionConfig) -> int:
    """Return the number of GPUs that a private cluster has: those of this machine; 0 where the cluster is another.

    Args:
        execution: Configuration of workers and cluster.
    """
    import torch

    return torch.cuda.device_count() if execution.cluster_address is None else 0


def foretold_workers(execution: ExecutionConfig, has_gpus: bool) -> int:
    """Return how many workers a run will start, or 1 where only its cluster will tell.

    Args:
        execution: Configuration of workers and cluster.
        has_gpus: Whether each worker has a GPU.

    Raises:
        ConfigError: This machine has too few CPUs for one worker.
    """
    if isinstance(execution.workers, int):
        return execution.workers
    if execution.executor == "local":
        return local_workers(execution)
    gpus = gpus_here(execution) if has_gpus else 0
    if not runs_here(execution, has_gpus) and not gpus:
        return 1
    cpus = machine_cpus(execution)
    count = places([{"CPU": cpus, "GPU": gpus}], execution.cpu_threads, has_gpus)
    if not count:
        raise ConfigError(
            f"execution.threads_per_worker: {execution.cpu_threads}, but this machine has {cpus} CPUs, not enough for "
            "one worker; lower it, or give a number of workers"
        )
    return count


def count_note(execution: ExecutionConfig, has_gpus: bool) -> str | None:
    """Say that a run may start more than the one worker that is planned for; None where it will not.

    Args:
        execution: Configuration of workers and cluster.
        has_gpus: Whether each worker has a GPU.
    """
    if execution.workers != "auto" or execution.executor == "local" or runs_here(execution, has_gpus):
        return None
    if has_gpus and gpus_here(execution):
        return None
    return "planned for one worker; execution.workers: auto takes all that the cluster has room for (--workers N)"
