"""What the tuning of scales came to: of a block, and of all blocks of a finished run."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Self

from astro_dist.run_directory.plain_record import PlainRecord
from astro_dist.wording import counted, percent

__all__ = ["Tuning", "TuningFigures"]

_MOST_NAMED = 8
"""Number of blocks that are named one by one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning(PlainRecord):
    """Holds what came of tuning the scales of a block.

    Attributes:
        steps: Number of steps that were asked for.
        before: Weighted error of the block's outputs on the tuning text before, relative to their weighted energy; None
            where it is no number.
        after: The same with the scales that were written.
        reason: Why nothing was tuned; empty where it was.
    """

    steps: int
    before: float | None
    after: float | None
    reason: str = ""

    @property
    def fall(self) -> float:
        """Share by which the error fell; 0 where nothing was tuned."""
        return 1 - self.after / self.before if self.before and self.after is not None else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningFigures(PlainRecord):
    """Holds the figures of all blocks whose scales were to be tuned.

    Attributes:
        steps: Number of steps a block.
        blocks: Number of blocks whose scales were tuned.
        fall: Median over these blocks of the share by which the error of their outputs fell, on the text that they were
            tuned on.
        untuned: Indices of the other blocks.
        reason: The most frequent reason why others were not tuned; empty where there are none.
    """

    steps: int
    blocks: int
    fall: float
    untuned: tuple[int, ...]
    reason: str

    @classmethod
    def of(cls, tunings: Iterable[Tuning | None]) -> Self | None:
        """Add up the figures of blocks.

        Args:
            tunings: What came of each block of the last round, in order; None where none was asked for.

        Returns:
            The figures; None where no block was to be tuned.
        """
        asked = {index: tuning for index, tuning in enumerate(tunings) if tuning is not None}
        if not asked:
            return None
        reasons = Counter(tuning.reason for tuning in asked.values() if tuning.reason)
        falls = [tuning.fall for tuning in asked.values() if not tuning.reason]
        return cls(
            steps=next(iter(asked.values())).steps,
            blocks=len(falls),
            fall=statistics.median(falls) if falls else 0.0,
            untuned=tuple(index for index, tuning in asked.items() if tuning.reason),
            reason=reasons.most_common(1)[0][0] if reasons else "",
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned.

        Args:
            content: JSON object with every field.
        """
        return super().from_json({**content, "untuned": tuple(content["untuned"])})

    @property
    def in_words(self) -> str:
        """Say what was tuned, and what that gained; empty where nothing was tuned."""
        if not self.blocks:
            return ""
        return (
            f"scales of {counted(self.blocks, 'block')} were tuned in {counted(self.steps, 'step')}: the error of what "
            f"a block returns fell by {percent(self.fall, 1)} in the median, on the text that they were tuned on"
        )

    @property
    def untuned_in_words(self) -> str:
        """Say which blocks were not tuned, and why; empty where all were."""
        if not self.untuned:
            return ""
        numbers = ", ".join(str(index + 1) for index in self.untuned[:_MOST_NAMED])
        others = len(self.untuned) - _MOST_NAMED
        numbers += f" and {others} more" if others > 0 else ""
        blocks = f"{'block' if len(self.untuned) == 1 else 'blocks'} {numbers}"
        return f"the scales of {blocks} stay as they were solved: {self.reason}"
