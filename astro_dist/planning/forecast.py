"""What a run will need on a device: on that which is named, or on what the run would take here."""

import math
import os

from astro.errors import ConfigError
from astro_dist.config.execution import ExecutionConfig
from astro_dist.planning.compute_dtype import compute_dtype
from astro_dist.planning.devices import DEVICES, Device, gpu_here, measure, memory_shortage, usable_bytes
from astro_dist.planning.estimate import Estimate, estimate
from astro_dist.planning.validate import Prepared
from astro_dist.planning.worker_count import foretold_workers

__all__ = ["forecast"]


def forecast(prepared: Prepared, workers: int | None, device_name: str | None) -> Estimate:
    """Estimate what a run will need on workers that are all alike.

    Args:
        prepared: The run.
        workers: Number of workers. None stands for as many as the run will start, or 1 where only its cluster tells.
        device_name: Name of a GPU, or `cpu` for the CPU of this machine. None stands for what the run would take here:
            this machine's GPU where it has one.

    Returns:
        The estimate.

    Raises:
        ConfigError: The device is unknown or too small.
    """
    config, execution = prepared.config, prepared.config.execution
    device = _device(execution, device_name)
    kind = "cuda" if device.memory_bytes else "cpu"
    count = workers or foretold_workers(execution, has_gpus=kind == "cuda")
    dtype = compute_dtype(config, prepared.plan, prepared.checkpoint, kind)
    at_once = None
    if kind == "cpu" and execution.cluster_address is None:
        at_once = max(1, (os.cpu_count() or 1) // execution.cpu_threads)
    needed = estimate(config, prepared.plan, dtype, count, device, at_once)
    available = usable_bytes(device.memory_bytes) or math.inf
    shortage = memory_shortage(needed.worker_bytes, available, f"a {device.name}")
    if shortage:
        raise ConfigError(shortage)
    return needed


def _device(execution: ExecutionConfig, name: str | None) -> Device:
    """Return the device of a name, or that which the run would take."""
    name = name.lower() if name else None
    if name is None and execution.device != "cpu" and execution.cluster_address is None:
        gpu = gpu_here()
        if gpu is not None:
            return gpu
    if name is None and execution.device == "cuda":
        raise ConfigError(f"execution.device is cuda: say which GPUs with --device, one of {', '.join(DEVICES)}")
    if name in (None, "cpu"):
        return measure(execution.cpu_threads)
    if name not in DEVICES:
        raise ConfigError(f"--device {name}: expected cpu or one of {', '.join(DEVICES)}")
    return DEVICES[name]
