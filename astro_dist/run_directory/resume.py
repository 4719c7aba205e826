"""How a run goes on: its schedule is made from what the run directory holds, which is nothing at the beginning."""

from collections.abc import Collection, Sequence

import torch

from astro.errors import ConfigError, DamagedError
from astro.model.call_file import read_recording
from astro_dist.config.schema import RunConfig
from astro_dist.planning.units import Plan
from astro_dist.run_directory.beginning import mend_tokens
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.unit_record import EmbedResult
from astro_dist.schedule.factory import schedule_of
from astro_dist.schedule.names import (
    CHANNELS,
    EMBED,
    ENERGY,
    GRADIENT,
    block_of_unit,
    block_unit,
    is_held_out,
    sequential_units,
    smoothing_unit,
    stream_names,
    unit_names,
    weights_unit,
)
from astro_dist.schedule.schedule import RunShape, Schedule, StartingPoint
from astro_dist.source.calibration_text import Chunk, as_tensors

__all__ = ["make_schedule", "require_same_arithmetic"]


def make_schedule(config: RunConfig, plan: Plan, run: RunDirectory, chunks: Sequence[Chunk]) -> Schedule:
    """Make the schedule of a run. Every record is read, and every file is checked against its checksum.

    Args:
        config: Configuration of the run.
        plan: Plan of the run.
        run: Run directory.
        chunks: Chunks of the calibration text, in the order in which they travel.

    Returns:
        The schedule, which begins where the run stopped.

    Raises:
        ConfigError: A record belongs to another run.
    """
    mend_tokens(run, as_tensors(chunks))
    names, blocks, copies = [chunk.name for chunk in chunks], len(plan.blocks), len(plan.copies)
    evaluated = any(is_held_out(name) for name in names)
    present = {stream: run.present(stream) for stream in (*stream_names(run.rounds), GRADIENT, ENERGY, CHANNELS)}
    sequential = config.execution.mode == "sequential"
    units = (
        sequential_units(blocks, copies, evaluated) if sequential else unit_names(blocks, copies, run.rounds, evaluated)
    )
    finished = _finished(run, units)
    if config.calibration.token_weights == "loss" and not finished.issuperset(units):
        finished |= _weighed(run, finished, blocks)
    if config.activations.smoothing != "none":
        finished |= {unit for unit in map(smoothing_unit, range(blocks)) if run.finished(unit) is not None}
    shapes = {chunk.tokens.shape for chunk in chunks}
    if config.quantization.tune_steps:
        shapes |= {(1, chunk.tokens.shape[1]) for chunk in chunks if not is_held_out(chunk.name)}
    if any(unit not in finished for unit in units) and not _is_recorded(run, shapes, blocks):
        finished.discard(EMBED)
    written = None if sequential else {unit for unit in finished if run.has_files(unit)}
    return schedule_of(config, RunShape(blocks, copies, names), StartingPoint(finished, present, written))


def _is_recorded(run: RunDirectory, shapes: Collection[tuple[int, ...]], num_blocks: int) -> bool:
    """Tell whether all files are there that say what blocks are called with: one a shape, and what differs by chunk."""
    paths = {run.calls(*shape) for shape in shapes}
    if not all(path.is_file() for path in paths):
        return False
    try:
        different = [chunk for path in paths for chunk in read_recording(path).different]
    except DamagedError:  # the worker that reads it will say so, and it is made again
        return False
    needed = {run.chunk_call(chunk, block) for chunk in different for block in range(num_blocks)}
    return needed <= {path for folder in {path.parent for path in needed} for path in folder.glob("*")}


def _weighed(run: RunDirectory, finished: Collection[str], num_blocks: int) -> set[str]:
    """The units of token weights whose records hold. The weights of a block that is finished may be gone."""
    weighed: set[str] = set()
    for block in range(num_blocks):
        is_solved = all(block_unit(r, block) in finished for r in range(run.rounds))
        if run.finished(weights_unit(block), superseded=is_solved) is not None:
            weighed.add(weights_unit(block))
    return weighed


def _finished(run: RunDirectory, units: Sequence[str]) -> set[str]:
    """The units whose records hold. Later rounds are checked first, because the shards that they used may be gone."""
    finished: set[str] = set()
    for unit in reversed(units):
        place = block_of_unit(unit)
        superseded = place is not None and block_unit(place[0] + 1, place[1]) in finished
        if run.finished(unit, superseded) is not None:
            finished.add(unit)
    return finished


def require_same_arithmetic(run: RunDirectory, dtype: torch.dtype, device: str) -> None:
    """Refuse to go on in another dtype or on another kind of device: the result would become a mixture.

    Args:
        run: Run directory.
        dtype: Dtype of forward passes.
        device: Type of the workers' devices, "cpu" or "cuda".

    Raises:
        ConfigError: The run was begun otherwise.
    """
    record = run.finished(EMBED)
    if record is None:
        return
    begun = record.result
    assert isinstance(begun, EmbedResult)
    before, kind = begun.compute_dtype, begun.device
    if before != str(dtype):
        raise ConfigError(
            f"{run.root}: this run was begun in {before} and would go on in {dtype} on this hardware; "
            f"set execution.compute_dtype: {before.removeprefix('torch.')}, or choose another directory with --output"
        )
    if kind != device:
        raise ConfigError(
            f"{run.root}: this run was begun on {kind} and would go on on {device}; set execution.device: {kind}, wait "
            "for such workers, or choose another directory with --output"
        )
