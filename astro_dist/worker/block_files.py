"""The files that a solved block becomes: its shard, its corrections of low rank beside it, and then its record."""

from pathlib import Path

from astro.formats import LAYOUTS, peft_adapter
from astro.formats.block_shard import kept_keys, pack_block
from astro.quantization.grid import QuantizedLinear
from astro.storage.atomic import save_tensors
from astro.timing import add_seconds, timed
from astro_dist.planning.units import BlockUnit
from astro_dist.run_directory.unit_record import BlockResult, UnitRecord
from astro_dist.schedule.names import block_unit
from astro_dist.worker.block_recipe import block_recipe
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.machine import describe_machine
from astro_dist.worker.solved_block import SolvedBlock

__all__ = ["finish_block", "write_block"]


def finish_block(
    runner: BlockRunner, round_index: int, unit: BlockUnit, solved: SolvedBlock, read_s: float = 0.0
) -> UnitRecord:
    """Write a solved block's shard, then its record.

    Args:
        runner: Runner of the worker's blocks.
        round_index: Index of the round.
        unit: Unit of the block.
        solved: The block.
        read_s: Seconds that it took to read the block's tiles, which count as those of writing.
    """
    seconds = {**solved.seconds, "write": read_s}
    for layer in solved.records:
        add_seconds(seconds, layer.seconds)
    with timed(seconds, "write", runner.device):
        paths = write_block(runner, unit, round_index, dict(solved.layers))
    result = BlockResult(
        layers=tuple(solved.records),
        seconds=seconds,
        cache_scales=solved.cache_scales,
        tuning=solved.tuning,
        **describe_machine(runner.device),
    )
    return runner.spec.run.finish(block_unit(round_index, unit.index), paths, result)


def write_block(
    runner: BlockRunner, unit: BlockUnit, round_index: int, quantized_: dict[str, QuantizedLinear]
) -> list[Path]:
    """Write a block's shard: packed layers, and every other tensor as it was, or as smoothed inputs want it.

    Corrections have a file of their own.

    Args:
        runner: Runner of the worker's blocks.
        unit: Unit of the block.
        round_index: Index of the round.
        quantized_: Every quantized layer by name, which is taken out as it is packed.

    Returns:
        The paths of the files.
    """
    spec, scale_dtype = runner.spec, block_recipe(runner.spec, unit).scale_dtype
    corrections = {name: layer.correction for name, layer in quantized_.items() if layer.correction}
    layout = LAYOUTS[spec.quantization.format]
    kept = runner.smoothed.applied(unit, spec.checkpoint.read(kept_keys(unit.linears, unit.keys)))
    tensors = pack_block(layout, unit.linears, quantized_, kept, scale_dtype, runner.device)
    path = spec.run.shard(round_index, unit.file)
    save_tensors(path, tensors)
    if not corrections:
        return [path]
    beside = spec.run.corrections(round_index, unit.file)
    save_tensors(beside, peft_adapter.pack(corrections))
    return [path, beside]
