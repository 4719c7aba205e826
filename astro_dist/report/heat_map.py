"""The heat map of a report: the relative error of every layer, by kind of layer and block."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from astro.quantization.layer_record import LayerRecord

__all__ = ["LEVELS", "Cell", "HeatMap", "Strip", "heat_map", "map_of_kinds"]

LEVELS = 9
"""Number of colours, which stand for equal steps of the error's logarithm."""
_FIRST = 0.05
"""Share of the errors that are no larger than where the colours begin, so that single small ones do not darken all."""
_LEAST_SPAN = 10.0
"""Least ratio between both ends of the colours, so that layers that are much alike look alike."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell shows the layers of one kind in one block.

    Attributes:
        block: Index of the block.
        level: Number of the colour, from 0.
        title: Description of what it shows.
    """

    block: int
    level: int
    title: str


@dataclasses.dataclass(frozen=True)
class Strip:
    """A strip shows the layers of one kind in all blocks.

    Attributes:
        label: Name of the kind.
        figures: Median and largest error, in words.
        cells: Cells of the blocks that have such layers.
    """

    label: str
    figures: str
    cells: tuple[Cell, ...]


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """The errors, or other figures, of all layers.

    Attributes:
        strips: Strips from the first layer of a block to the last; kinds with several layers in a block have two.
        first: Index of the first block.
        last: Index of the last block.
        least: Error at which the colours begin.
        most: Error at which the colours end.
    """

    strips: tuple[Strip, ...]
    first: int
    last: int
    least: float
    most: float

    @property
    def num_blocks(self) -> int:
        """Return the number of blocks from the first to the last."""
        return self.last - self.first + 1


def heat_map(blocks: Mapping[int, Sequence[LayerRecord]]) -> HeatMap | None:
    """Make the heat map of a round.

    Args:
        blocks: Records of layers by index of the block.

    Returns:
        The heat map; None where no layer was quantized yet.
    """
    kinds: dict[str, dict[int, list[float]]] = {}
    for index, layers in blocks.items():
        for layer in layers:
            kinds.setdefault(layer.kind, {}).setdefault(index, []).append(layer.relative_error)
    return map_of_kinds(kinds) if kinds else None


def map_of_kinds(kinds: Mapping[str, Mapping[int, Sequence[float]]], all_figures: Sequence[float] = ()) -> HeatMap:
    """Make the heat map of any figure that layers have.

    Args:
        kinds: Figures of the layers of each kind by index of the block; at least one.
        all_figures: Figures of all heat maps that shall have the same colours; empty for this one alone.
    """
    figures = [figure for by_block in kinds.values() for members in by_block.values() for figure in members]
    colours = _Colours.of(all_figures or figures)
    strips = [strip for kind, by_block in kinds.items() for strip in _strips(kind, by_block, colours)]
    blocks = {index for by_block in kinds.values() for index in by_block}
    return HeatMap(tuple(strips), min(blocks), max(blocks), colours.least, colours.most)


@dataclasses.dataclass(frozen=True)
class _Colours:
    """Gives every error a colour.

    Attributes:
        least: Error at which the colours begin.
        most: Error at which the colours end.
    """

    least: float
    most: float

    @classmethod
    def of(cls, errors: Sequence[float]) -> "_Colours":
        """Choose both ends. An error of 0 has the first colour, whatever the others are."""
        positive = sorted(error for error in errors if 0 < error < math.inf) or [1.0]
        least, most = positive[int(_FIRST * len(positive))], positive[-1]
        return cls(min(least, most / _LEAST_SPAN), most)

    def level(self, error: float) -> int:
        if error >= self.most:
            return LEVELS - 1
        if not error > self.least:
            return 0
        return int(LEVELS * math.log(error / self.least) / math.log(self.most / self.least))


def _strips(kind: str, by_block: Mapping[int, Sequence[float]], colours: _Colours) -> list[Strip]:
    """One strip of a kind, or two where a block has several such layers."""
    label = kind.replace("+", " + ")
    errors = [error for members in by_block.values() for error in members]
    median, largest = f"median {statistics.median(errors):.2g}", f"largest {max(errors):.2g}"
    if all(len(members) == 1 for members in by_block.values()):
        cells = (Cell(i, colours.level(e), f"block {i}, {label}: {e:.3g}") for i, (e,) in by_block.items())
        return [Strip(label, f"{median}, {largest}", tuple(cells))]
    medians = {index: statistics.median(members) for index, members in by_block.items()}
    maxima = {index: max(members) for index, members in by_block.items()}
    strips = []
    for name, figures, shown in (
        (f"{label}, median of each block", f"{median}, least {min(errors):.2g}", medians),
        (f"{label}, largest of each block", largest, maxima),
    ):
        cells = (
            Cell(i, colours.level(shown[i]), f"block {i}, {name}: {shown[i]:.3g}; {_range(members)}")
            for i, members in by_block.items()
        )
        strips.append(Strip(name, figures, tuple(cells)))
    return strips


def _range(errors: Sequence[float]) -> str:
    return f"{len(errors)} from {min(errors):.3g} to {max(errors):.3g}"
