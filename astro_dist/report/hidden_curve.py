"""The curve of a report: how far the hidden states of the result are from the source's, behind every block."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from astro_dist.wording import percent

__all__ = ["Curve", "HiddenCurves", "Point", "hidden_curves"]

_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Values at which the vertical axis may end; it ends at the largest error where that is above all of them."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of a curve. Both coordinates are shares of the drawing, from the left and from the top.

    Attributes:
        x: Place of the block.
        y: Place of the error.
        title: Block and error, in words.
    """

    x: float
    y: float
    title: str


@dataclasses.dataclass(frozen=True)
class Curve:
    """The curve of one round. It has gaps where blocks have no figure.

    Attributes:
        pieces: Points between the gaps.
        is_last: Whether the round is the last one.
    """

    pieces: tuple[tuple[Point, ...], ...]
    is_last: bool


@dataclasses.dataclass(frozen=True)
class HiddenCurves:
    """The curves of all rounds.

    Attributes:
        curves: Curves, the first round first.
        num_blocks: Number of blocks.
        top: Error at the upper end, in words.
        half: Error at half the height, in words.
        end: Error behind the last block of the last round, in words.
    """

    curves: tuple[Curve, ...]
    num_blocks: int
    top: str
    half: str
    end: str


def hidden_curves(errors: Mapping[int, Sequence[float | None]]) -> HiddenCurves | None:
    """Make the curves.

    Args:
        errors: Relative errors behind each block, by round.

    Returns:
        The curves; None where nothing was measured.
    """
    measured = [error for figures in errors.values() for error in figures if error is not None and math.isfinite(error)]
    if not measured:
        return None
    largest = max(measured)
    top = next((step for step in _STEPS if step >= largest), largest)
    last = max(errors)
    curves = [Curve(_pieces(errors[r], top, f"round {r}, " if last else ""), r == last) for r in sorted(errors)]
    end = errors[last][-1]
    digits = 0 if top >= 0.05 else 1
    return HiddenCurves(
        tuple(curves),
        len(errors[last]),
        percent(top, digits),
        percent(top / 2, digits if top >= 0.1 else digits + 1),
        "not measured" if end is None else percent(end, 1),
    )


def _pieces(errors: Sequence[float | None], top: float, prefix: str) -> tuple[tuple[Point, ...], ...]:
    pieces: list[list[Point]] = [[]]
    for block, error in enumerate(errors):
        if error is None or not math.isfinite(error):
            pieces.append([])
            continue
        x = (block + 0.5) / len(errors)
        pieces[-1].append(Point(x, 1 - error / top, f"{prefix}behind block {block}: {percent(error, 1)}"))
    return tuple(tuple(piece) for piece in pieces if piece)
