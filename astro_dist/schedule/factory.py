"""The choice of the schedule for a run's mode."""

from astro_dist.config.schema import RunConfig
from astro_dist.schedule.block_parallel import BlockSchedule
from astro_dist.schedule.schedule import NOTHING_DONE, RunShape, Schedule, StartingPoint
from astro_dist.schedule.sequential import SequentialSchedule

__all__ = ["schedule_of"]


def schedule_of(config: RunConfig, shape: RunShape, start: StartingPoint = NOTHING_DONE) -> Schedule:
    """Return the schedule of a run in the mode that its configuration asks for.

    Args:
        config: Configuration of the run.
        shape: Size of the run.
        start: What of the run is done already.
    """
    execution = config.execution
    if execution.mode == "sequential":
        return SequentialSchedule(shape, execution.hessian_shares, start, config.quantization.compensates)
    return BlockSchedule(shape, start, execution.rounds, measured_first=config.quantization.bits == "auto")
