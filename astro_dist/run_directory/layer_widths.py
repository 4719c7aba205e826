"""Which width every layer gets: from the configuration, or, with `bits: auto`, from measured layer errors.

Round 0 measures what each width would cost each input group; a knapsack then spends the average width where it saves
the most error.
"""

from collections.abc import Collection, Mapping

from astro.config import LayerScheme, Quantization
from astro.errors import DamagedError
from astro.quantization.bit_allocation import allocate, choices_of, provisional_width
from astro.storage.atomic import write_json
from astro_dist.planning.units import BlockUnit
from astro_dist.run_directory.records import RunDirectory, read_own_json
from astro_dist.run_directory.unit_record import BlockResult
from astro_dist.schedule.names import block_unit

__all__ = ["layer_schemes", "settle_widths"]


def settle_widths(run: RunDirectory, quantization: Quantization, num_blocks: int, finished: Collection[str]) -> None:
    """With a width budget: spend it as soon as the first round has measured every block.

    Args:
        run: Run directory.
        quantization: Settings of the run.
        num_blocks: Number of blocks of the model.
        finished: Names of the units that are finished.

    Raises:
        DamagedError: The record of a block cannot be read.
    """
    if quantization.bits != "auto" or _is_settled(run):
        return
    units = [block_unit(0, block) for block in range(num_blocks)]
    if all(unit in finished for unit in units):
        layers = [layer for unit in units for layer in run.read(unit, BlockResult).layers]
        widths = allocate(choices_of(layers, quantization), quantization.average_bits or 0.0)
        write_json(run.allocation, {name: bits for names, bits in widths.items() for name in names.split("+")})


def layer_schemes(
    run: RunDirectory, quantization: Quantization, unit: BlockUnit, round_index: int
) -> dict[str, LayerScheme]:
    """Return the scheme of each layer of a block in a round, by name.

    Args:
        run: Run directory, which holds the chosen widths from round 1 on.
        quantization: Settings of the whole run.
        unit: Block whose layers are meant.
        round_index: Index of the round.

    Raises:
        DamagedError: The file of the chosen widths is missing or damaged.
    """
    widths: Mapping[str, int | None] = {}
    if quantization.bits == "auto" and round_index == 0:
        widths = dict.fromkeys((linear.name for linear in unit.linears), provisional_width(quantization))
    elif quantization.bits == "auto":
        widths = read_own_json(run.allocation)
    return {
        linear.name: quantization.scheme(linear.name, linear.columns, widths.get(linear.name))
        for linear in unit.linears
    }


def _is_settled(run: RunDirectory) -> bool:
    """Whether the chosen widths can be read; from the same measurements they are chosen alike again."""
    try:
        read_own_json(run.allocation)
    except DamagedError:
        return False
    return True
