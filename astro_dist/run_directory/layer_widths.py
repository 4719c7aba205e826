"""Which width every layer gets: from the configuration, or, with `bits: auto`, from measured layer errors.

Round 0 measures what each width would cost each group of layers; a knapsack then spends the average width where it
saves the most error.
"""

from collections.abc import Collection, Mapping

from astro.config import Quantization
from astro.errors import CheckpointError, DamagedError
from astro.quantization.bit_allocation import allocate, provisional_width, read_choices
from astro.storage.atomic import read_json, write_json
from astro_dist.planning.units import BlockUnit
from astro_dist.run_directory.records import RunDirectory
from astro_dist.schedule.names import block_unit

__all__ = ["layer_settings", "settle_widths"]


def settle_widths(run: RunDirectory, quantization: Quantization, num_blocks: int, finished: Collection[str]) -> None:
    """With a width budget: spend it as soon as the first round has measured every block.

    Args:
        run: the run directory.
        quantization: of the run.
        num_blocks: of the model.
        finished: names of the units that are finished.
    """
    if quantization.bits != "auto" or run.allocation.is_file():
        return
    units = [block_unit(0, block) for block in range(num_blocks)]
    if all(unit in finished for unit in units):
        layers = [layer for unit in units for layer in run.read(unit)["layers"]]
        widths = allocate(read_choices(layers, quantization), quantization.average_bits or 0.0)
        write_json(run.allocation, {name: bits for group, bits in widths.items() for name in group.split("+")})


def layer_settings(
    run: RunDirectory, quantization: Quantization, unit: BlockUnit, round_index: int
) -> dict[str, Quantization]:
    """The settings of each layer of a block in a round, its width settled.

    Args:
        run: where the chosen widths are, from round 1 on.
        quantization: of the whole run.
        unit: the block.
        round_index: of the round.
    """
    widths: Mapping[str, int | None] = {}
    if quantization.bits == "auto" and round_index == 0:
        widths = dict.fromkeys((linear.name for linear in unit.linears), provisional_width(quantization))
    elif quantization.bits == "auto":
        try:
            widths = read_json(run.allocation)
        except CheckpointError as error:
            raise DamagedError(run.allocation, str(error)) from error
    return {
        linear.name: quantization.for_layer(linear.name, widths.get(linear.name)).fitted(linear.columns)
        for linear in unit.linears
    }
