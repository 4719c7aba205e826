"""The chart of a report, which draws relative layer errors over blocks, one line for each kind of layer."""

import dataclasses
from collections.abc import Mapping, Sequence

from astro.quantization.layer_record import LayerRecord

__all__ = ["Chart", "Label", "Line", "error_chart"]

_WIDTH, _HEIGHT, _MARGIN = 860, 240, 46
_COLOURS = ("#1f6fb4", "#d1571e", "#2e8540", "#8a4bb0", "#b8860b", "#5f6b73", "#c2185b", "#00838f")
_GREY = "#57606a"
_LEGEND_COLUMNS = 4


@dataclasses.dataclass(frozen=True)
class Label:
    """Places a text in the chart.

    Attributes:
        x: Coordinate of the text's left end.
        y: Coordinate of the line on which the text stands, counted from the top.
        text: The text itself.
        colour: Colour of the text, as SVG writes it.
    """

    x: int
    y: int
    text: str
    colour: str = _GREY


@dataclasses.dataclass(frozen=True)
class Line:
    """Draws the line of one kind of layer.

    Attributes:
        points: Coordinates of the points, as SVG writes them.
        colour: Colour of the line, as SVG writes it.
    """

    points: str
    colour: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """Holds everything that the chart consists of. All coordinates are in the units of the drawing.

    Attributes:
        labels: Texts at the ends of both axes, and of the legend.
        lines: Lines in the order of the legend.
        width: Width of the drawing.
        height: Height of the drawing.
        left: Coordinate of the left end of the horizontal axis.
        right: Coordinate of the right end of the horizontal axis.
        bottom: Coordinate of the horizontal axis, counted from the top.
    """

    labels: tuple[Label, ...]
    lines: tuple[Line, ...]
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _MARGIN
    right: int = _WIDTH - _MARGIN
    bottom: int = _HEIGHT - _MARGIN


def error_chart(blocks: Mapping[int, Sequence[LayerRecord]]) -> Chart:
    """Draw the relative errors of a round. Where a block has several layers of a kind, it draws their mean.

    Args:
        blocks: Records of layers by index of the block; there is at least one.
    """
    kinds: dict[str, dict[int, list[float]]] = {}
    for index, layers in blocks.items():
        for layer in layers:
            kinds.setdefault(layer.kind, {}).setdefault(index, []).append(layer.relative_error)
    means = {kind: {index: sum(e) / len(e) for index, e in sorted(errors.items())} for kind, errors in kinds.items()}
    last = max(*blocks, 1)
    top = max(error for errors in means.values() for error in errors.values()) or 1.0

    def at(index: int, error: float) -> str:
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * index / last
        return f"{x:.1f},{_HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * error / top:.1f}"

    below = _HEIGHT - _MARGIN + 16
    labels = [
        Label(_MARGIN, below, "block 0"),
        Label(_WIDTH - _MARGIN - 40, below, f"block {last}"),
        Label(4, _MARGIN + 4, f"{top:.2g}"),
    ]
    lines = []
    for number, (kind, errors) in enumerate(sorted(means.items())):
        colour, (row, column) = _COLOURS[number % len(_COLOURS)], divmod(number, _LEGEND_COLUMNS)
        lines.append(Line(" ".join(at(*point) for point in errors.items()), colour))
        labels.append(Label(_MARGIN + 10 + 200 * column, 14 + 14 * row, kind, colour))
    return Chart(tuple(labels), tuple(lines))
