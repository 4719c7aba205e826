"""What people are told instead of the names of units, which are made for files: "block 4 of 30"."""

import dataclasses
import re

from astro_dist.schedule.names import (
    EMBED,
    LOSS_GRADIENT,
    ORIGINAL,
    block_of_unit,
    copy_index,
    evaluate_unit,
    head_unit,
    round_of_stream,
    smoothing_unit,
    weights_unit,
)

__all__ = ["UnitWords"]

_LAST_NUMBER = re.compile(r"\d+$")


@dataclasses.dataclass(frozen=True)
class UnitWords:
    """Puts the units of a run into words. Blocks and rounds are counted from 1.

    Attributes:
        num_blocks: Number of blocks of the model; 0 where it is not known.
        rounds: Number of passes over the model.
    """

    num_blocks: int
    rounds: int = 1

    def block(self, block: int, round_index: int | None = None) -> str:
        """Name a block, such as "block 4 of 30".

        Args:
            block: Index of the block.
            round_index: Index of the round; None where the block is not quantized.
        """
        total = f" of {self.num_blocks}" if self.num_blocks else ""
        place = f"round {round_index + 1}, " if round_index is not None and self.rounds > 1 else ""
        return f"{place}block {block + 1}{total}"

    def unit(self, unit: str) -> str:
        """Name a unit. Anything that is no unit is returned as it is.

        Args:
            unit: Name of the unit.
        """
        if (place := block_of_unit(unit)) is not None:
            return self.block(place[1], place[0])
        if (copied := copy_index(unit)) is not None:
            return f"copying other tensors, part {copied + 1}"
        number = _LAST_NUMBER.search(unit)
        block = int(number[0]) if number else 0
        words = {
            EMBED: "embedding",
            LOSS_GRADIENT: "gradient of the loss",
            head_unit(ORIGINAL): "perplexity of the original",
            smoothing_unit(block): f"smoothing of {self.block(block)}",
            weights_unit(block): f"token weights of {self.block(block)}",
            evaluate_unit(block): f"evaluation of {self.block(block)}",
        }
        return words.get(unit) or self._head(unit) or unit

    def _head(self, unit: str) -> str | None:
        """Name the unit that measures what a round wrote; None for any other unit."""
        stream = unit.removeprefix(head_unit(""))
        written = round_of_stream(stream) if head_unit(stream) == unit else None
        if written is None:
            return None
        return f"perplexity after round {written + 1}" if self.rounds > 1 else "perplexity of the result"
