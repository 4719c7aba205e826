"""The calls that measure by the loss how much each token counts."""

import dataclasses
from typing import ClassVar

from astro_dist.schedule.names import LOSS_GRADIENT, weights_unit
from astro_dist.schedule.wave_call import WaveCall

__all__ = ["Backward", "DifferentiateLoss", "WeighTokens"]


@dataclasses.dataclass(frozen=True)
class DifferentiateLoss(WaveCall):
    """Compute the gradient of one chunk's loss with respect to the last block's output.

    Attributes:
        chunk: Name of the chunk.
    """

    chunk: str
    verb: ClassVar[str] = "differentiate loss"

    @property
    def unit(self) -> str:
        """Return the name of the unit that the call belongs to."""
        return LOSS_GRADIENT


@dataclasses.dataclass(frozen=True)
class Backward(WaveCall):
    """Take the gradient of one chunk back through a block, and measure it at the block's layers.

    Attributes:
        block: Index of the block.
        chunk: Name of the chunk.
    """

    block: int
    chunk: str
    verb: ClassVar[str] = "backward"

    @property
    def unit(self) -> str:
        """Return the name of the unit that the call belongs to."""
        return weights_unit(self.block)


@dataclasses.dataclass(frozen=True)
class WeighTokens:
    """Turn what all chunks measured at a block's layers into the weights of their tokens.

    Attributes:
        block: Index of the block.
    """

    block: int
    verb: ClassVar[str] = "weigh tokens"

    @property
    def unit(self) -> str:
        """Return the name of the unit that the call belongs to."""
        return weights_unit(self.block)
