"""The schedule of a run, from what its directory holds: nothing at the beginning, or what is finished already."""

from collections.abc import Collection, Sequence

from astro_dist.block_schedule import BlockSchedule
from astro_dist.calibration import Chunk, as_tensors
from astro_dist.config import RunConfig
from astro_dist.manifest import RunDirectory
from astro_dist.plan import Plan
from astro_dist.schedule import Present, Schedule, block_unit, is_held_out, stream_names, unit_names
from astro_dist.sequential_schedule import SequentialSchedule, sequential_units

__all__ = ["make_schedule", "schedule_of"]


def make_schedule(config: RunConfig, plan: Plan, run: RunDirectory, chunks: Sequence[Chunk]) -> Schedule:
    """Read every record, check every file against its checksum, and go on from there.

    Args:
        config: of the run.
        plan: every unit.
        run: the run directory.
        chunks: in the order in which they travel.
    """
    run.mend_tokens(as_tensors(chunks))
    names, blocks, copies = [chunk.name for chunk in chunks], len(plan.blocks), len(plan.copies)
    evaluated = any(is_held_out(name) for name in names)
    present = {stream: run.present(stream) for stream in stream_names(run.rounds)}
    sequential = config.execution.mode == "sequential"
    units = (
        sequential_units(blocks, copies, evaluated) if sequential else unit_names(blocks, copies, run.rounds, evaluated)
    )
    finished = _finished(run, units)
    calls_there = all(run.calls(*chunk.tokens.shape).is_file() for chunk in chunks)
    if not calls_there and any(unit not in finished for unit in units):
        finished.discard("embed")
    written = None if sequential else {unit for unit in finished if run.has_files(unit)}
    return schedule_of(config, plan, names, finished, present, written)


def schedule_of(
    config: RunConfig,
    plan: Plan,
    chunks: Sequence[str],
    finished: Collection[str] = (),
    present: Present | None = None,
    written: Collection[str] | None = None,
) -> Schedule:
    """The schedule of a run's mode; of one that has not begun where nothing more is given.

    Args:
        config: of the run.
        plan: every unit.
        chunks: names in the order in which they travel.
        finished: names of the units that are finished.
        present: chunks that are there as input of each block.
        written: in mode `blocks` the finished units whose files are still there; all of them where not given.
    """
    blocks, copies, execution, there = len(plan.blocks), len(plan.copies), config.execution, present or {}
    if execution.mode == "sequential":
        shares, compensated = execution.hessian_shares, config.quantization.compensates
        return SequentialSchedule(blocks, copies, chunks, shares, finished, there, compensated)
    measured_first = config.quantization.bits == "auto"
    return BlockSchedule(blocks, copies, chunks, finished, there, execution.rounds, written, measured_first)


def _finished(run: RunDirectory, units: Sequence[str]) -> set[str]:
    """Units whose records hold. Later rounds come first: they tell which shards of earlier ones may be gone."""
    finished: set[str] = set()
    for unit in reversed(units):
        r, _, block = unit.removeprefix("round-").partition("-block-")
        superseded = bool(block) and block_unit(int(r) + 1, int(block)) in finished
        if run.finished(unit, superseded) is not None:
            finished.add(unit)
    return finished
