"""`calibration.chunk_samples: auto` is settled: the largest chunk with which a worker fits on the devices of the run.

It follows from the model and the configuration alone, never from the devices that are found. So the same configuration
means the same bytes everywhere, and the number is part of the run's identity as if it had been written there.
"""

from rich.filesize import decimal

from astro.errors import ConfigError
from astro.storage.checkpoint import Checkpoint
from astro_dist.config.schema import RunConfig
from astro_dist.planning.compute_dtype import compute_dtype
from astro_dist.planning.devices import usable_bytes
from astro_dist.planning.units import Plan
from astro_dist.planning.worker_memory import WorkerMemory

__all__ = ["chunk_note", "settle_chunks"]

_CHOICES = (8, 4, 2, 1)
"""Sequences in a chunk. More than eight of 2048 tokens make no product faster, and powers of two seldom leave a short
chunk at the end."""


def settle_chunks(config: RunConfig, plan: Plan, checkpoint: Checkpoint) -> RunConfig:
    """Return the configuration with a number in place of `chunk_samples: auto`; any other as it is.

    Args:
        config: Configuration of the run.
        plan: Units of the run.
        checkpoint: Opened checkpoint, whose dtype is taken where the configuration leaves the choice.

    Raises:
        ConfigError: The memory of a device is not named, or a worker does not fit with a single sequence in a chunk.
    """
    calibration, gigabytes = config.calibration, config.execution.device_memory_gb
    if calibration.chunk_samples != "auto":
        return config
    if gigabytes is None:
        raise ConfigError(
            "calibration.chunk_samples: auto wants execution.device_memory_gb, the memory of a worker's GPU in GB, "
            "such as 80 for an H100; it is not read off the devices, so that the result is the same on all"
        )
    needed = {sequences: _worker_bytes(config, plan, checkpoint, sequences) for sequences in _CHOICES}
    available = usable_bytes(int(gigabytes * 1e9))
    fitting = next((sequences for sequences in _CHOICES if needed[sequences] <= available), None)
    if fitting is None:
        raise ConfigError(
            f"calibration.chunk_samples: auto: with one sequence in a chunk a worker needs about {decimal(needed[1])}, "
            f"but of execution.device_memory_gb: {gigabytes:g} it can use {decimal(available)}; take devices with more "
            "memory, or lower calibration.sequence_length"
        )
    return config.model_copy(update={"calibration": calibration.model_copy(update={"chunk_samples": fitting})})


def chunk_note(config: RunConfig, plan: Plan, checkpoint: Checkpoint) -> str:
    """Say what was settled.

    Args:
        config: Configuration of the run, settled.
        plan: Units of the run.
        checkpoint: Opened checkpoint.
    """
    sequences = config.calibration.settled_chunk_samples
    needed = decimal(_worker_bytes(config, plan, checkpoint, sequences))
    return (
        f"calibration.chunk_samples: auto is {sequences}: a worker needs about {needed} of "
        f"{config.execution.device_memory_gb:g} GB (execution.device_memory_gb)"
    )


def _worker_bytes(config: RunConfig, plan: Plan, checkpoint: Checkpoint, sequences: int) -> int:
    """Memory of a worker with so many sequences in a chunk. Where the device is left open, a GPU is meant."""
    device = "cpu" if config.execution.device == "cpu" else "cuda"
    dtype = compute_dtype(config, plan, checkpoint, device)
    return WorkerMemory(plan, config, dtype, device).bytes(sequences)
