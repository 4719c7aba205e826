"""The calls that find out how the inputs of a block's layers are smoothed."""

import dataclasses
from typing import ClassVar

from astro_dist.schedule.names import smoothing_unit

__all__ = ["MeasureChannels", "SmoothChannels"]


@dataclasses.dataclass(frozen=True)
class MeasureChannels:
    """Pass one calibration chunk through a block of the source, and measure how large the channels of its inputs are.

    Attributes:
        block: Index of the block.
        chunk: Name of the chunk.
    """

    block: int
    chunk: str
    verb: ClassVar[str] = "measure channels"

    @property
    def unit(self) -> str:
        """Return the name of the unit that the call belongs to."""
        return smoothing_unit(self.block)


@dataclasses.dataclass(frozen=True)
class SmoothChannels:
    """Decide by what all chunks measured which channels of a block's inputs are made smaller, and where that goes.

    Attributes:
        block: Index of the block.
    """

    block: int
    verb: ClassVar[str] = "smooth channels"

    @property
    def unit(self) -> str:
        """Return the name of the unit that the call belongs to."""
        return smoothing_unit(self.block)
