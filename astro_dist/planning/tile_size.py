"""`execution.tile_weights: auto` is settled: the most weights at once with which a worker fits on the run's devices.

A large tile of experts holds many of them, and their columns are gone through together. It follows from the model and
the configuration alone, as the size of chunks does: a GPU may sum products of other heights in another order, so the
number is part of the run's identity.
"""

from astro.linalg.tiling import TILE_ELEMENTS
from astro.storage.checkpoint import Checkpoint
from astro_dist.config.schema import MOST_TILE_WEIGHTS, RunConfig
from astro_dist.planning.compute_dtype import compute_dtype
from astro_dist.planning.devices import usable_bytes
from astro_dist.planning.units import Plan
from astro_dist.planning.worker_memory import WorkerMemory

__all__ = ["settle_tiles", "tile_note"]


def settle_tiles(config: RunConfig, plan: Plan, checkpoint: Checkpoint) -> RunConfig:
    """Return the configuration with a number in place of `tile_weights: auto` where a larger one than usual fits.

    Args:
        config: Configuration of the run, the size of its chunks settled.
        plan: Units of the run.
        checkpoint: Opened checkpoint, whose dtype is taken where the configuration leaves the choice.
    """
    execution = config.execution
    if execution.tile_weights != "auto" or execution.device_memory_gb is None or execution.device == "cpu":
        return config
    available = usable_bytes(int(execution.device_memory_gb * 1e9))
    dtype = compute_dtype(config, plan, checkpoint, "cuda")
    size = MOST_TILE_WEIGHTS
    while size > TILE_ELEMENTS["cuda"]:
        settled = config.model_copy(update={"execution": execution.model_copy(update={"tile_weights": size})})
        needed = WorkerMemory(plan, settled, dtype, "cuda").bytes(config.calibration.settled_chunk_samples)
        if needed <= available:
            return settled
        size //= 2
    return config


def tile_note(config: RunConfig) -> str:
    """Say what was settled.

    Args:
        config: Configuration of the run, settled.
    """
    return (
        f"execution.tile_weights: auto is {config.execution.tile_weights}, by execution.device_memory_gb: "
        f"{config.execution.device_memory_gb:g}"
    )
