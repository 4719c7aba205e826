"""What the tuning of scales came to: of a block, and of all blocks of a finished run."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Self

from astro_dist.run_directory.plain_record import PlainRecord
from astro_dist.wording import counted, percent

__all__ = ["Tuning", "TuningFigures"]


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningFigures(PlainRecord):
    """Holds the figures of all blocks whose scales were to be tuned.

    Attributes:
        steps: Number of steps a block.
        blocks: Number of blocks whose scales were tuned.
        error_before: Mean over these blocks of the error of their outputs before, relative to the outputs.
        error_after: The same with tuned scales.
        untuned: Number of other blocks.
        reason: The most frequent reason why others were not tuned; empty where there are none.
    """

    steps: int
    blocks: int
    error_before: float
    error_after: float
    untuned: int
    reason: str

    @classmethod
    def of(cls, tunings: Iterable[Tuning | None]) -> Self | None:
        """Add up the figures of blocks.

        Args:
            tunings: What came of each block of the last round; None where none was asked for.

        Returns:
            The figures; None where no block was to be tuned.
        """
        asked = [tuning for tuning in tunings if tuning is not None]
        if not asked:
            return None
        tuned = [tuning for tuning in asked if not tuning.reason]
        reasons = Counter(tuning.reason for tuning in asked if tuning.reason)
        return cls(
            steps=asked[0].steps,
            blocks=len(tuned),
            error_before=statistics.mean(tuning.before or 0.0 for tuning in tuned) if tuned else 0.0,
            error_after=statistics.mean(tuning.after or 0.0 for tuning in tuned) if tuned else 0.0,
            untuned=len(asked) - len(tuned),
            reason=reasons.most_common(1)[0][0] if reasons else "",
        )

    @property
    def in_words(self) -> str:
        """Say what was tuned, and what that gained; empty where nothing was tuned."""
        if not self.blocks:
            return ""
        fell = percent(1 - self.error_after / self.error_before, 1)
        return (
            f"scales of {counted(self.blocks, 'block')} were tuned in {counted(self.steps, 'step')}: the mean error of "
            f"what a block returns fell by {fell} on the text that they were tuned on"
        )

    @property
    def untuned_in_words(self) -> str:
        """Say how many blocks were not tuned, and why; empty where all were."""
        if not self.untuned:
            return ""
        return f"the scales of {counted(self.untuned, 'block')} stay as they were solved: {self.reason}"
