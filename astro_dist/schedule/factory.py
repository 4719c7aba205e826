"""The schedule of a run's mode."""

from collections.abc import Collection, Sequence

from astro_dist.config.schema import RunConfig
from astro_dist.schedule.block_parallel import BlockSchedule
from astro_dist.schedule.calls import Present, Schedule
from astro_dist.schedule.sequential import SequentialSchedule

__all__ = ["schedule_of"]


def schedule_of(
    config: RunConfig,
    num_blocks: int,
    num_copies: int,
    chunks: Sequence[str],
    finished: Collection[str] = (),
    present: Present | None = None,
    written: Collection[str] | None = None,
) -> Schedule:
    """The schedule of a run's mode; of one that has not begun where nothing more is given.

    Args:
        config: of the run.
        num_blocks: number of blocks of the model.
        num_copies: number of units of copied tensors.
        chunks: names in the order in which they travel.
        finished: names of the units that are finished.
        present: chunks that are there as input of each block.
        written: in mode `blocks` the finished units whose files are still there; all of them where not given.
    """
    execution, there = config.execution, present or {}
    if execution.mode == "sequential":
        shares, compensated = execution.hessian_shares, config.quantization.compensates
        return SequentialSchedule(num_blocks, num_copies, chunks, shares, finished, there, compensated)
    measured_first = config.quantization.bits == "auto"
    return BlockSchedule(num_blocks, num_copies, chunks, finished, there, execution.rounds, written, measured_first)
