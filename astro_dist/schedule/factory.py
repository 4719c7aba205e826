"""The choice of the schedule for a run's mode."""

from collections.abc import Sequence

from astro_dist.config.schema import RunConfig
from astro_dist.schedule.block_parallel import BlockSchedule
from astro_dist.schedule.names import block_unit, stream_names
from astro_dist.schedule.schedule import NOTHING_DONE, RunShape, Schedule, StartingPoint
from astro_dist.schedule.sequential import SequentialSchedule
from astro_dist.schedule.smoothing import SmoothingSchedule
from astro_dist.schedule.token_weights import TokenWeightSchedule
from astro_dist.schedule.weighed_first import WeighedFirst

__all__ = ["schedule_of"]


def schedule_of(config: RunConfig, shape: RunShape, start: StartingPoint = NOTHING_DONE) -> Schedule:
    """Return the schedule of a run in the mode that its configuration asks for.

    Where inputs are smoothed, the wave that measures their channels comes first. Where tokens are weighted by the loss,
    the waves that measure the weights come next, for every block that is not finished yet.

    Args:
        config: Configuration of the run.
        shape: Size of the run.
        start: What of the run is done already.
    """
    if config.activations.smoothing == "none":
        return _weighed(config, shape, start)
    wave = SmoothingSchedule(shape, start, keeps_last=config.calibration.token_weights == "loss")
    return WeighedFirst(wave, lambda start: _weighed(config, shape, start), start, _embedded(config, shape))


def _embedded(config: RunConfig, shape: RunShape) -> dict[str, dict[int, Sequence[str]]]:
    """What is there in each stream once the tokens are embedded."""
    return {stream: {0: shape.chunks} for stream in stream_names(config.execution.rounds)}


def _weighed(config: RunConfig, shape: RunShape, start: StartingPoint) -> Schedule:
    if config.calibration.token_weights != "loss":
        return _of_mode(config, shape, start)
    units = {b: [block_unit(r, b) for r in range(config.execution.rounds)] for b in range(shape.num_blocks)}
    open_blocks = [b for b in units if not set(units[b]).issubset(start.finished)]
    waves = TokenWeightSchedule(shape, start, open_blocks)
    return WeighedFirst(waves, lambda start: _of_mode(config, shape, start), start, _embedded(config, shape))


def _of_mode(config: RunConfig, shape: RunShape, start: StartingPoint) -> Schedule:
    execution = config.execution
    if execution.mode == "sequential":
        return SequentialSchedule(shape, execution.hessian_shares, start, config.quantization.compensates)
    return BlockSchedule(
        shape,
        start,
        execution.rounds,
        measured_first=config.quantization.bits == "auto",
        in_stages=execution.mode == "stages",
    )
