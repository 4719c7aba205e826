"""What the calls of waves have in common: a worker loads weights, and stays with them while chunks pass one by one."""

import dataclasses
from typing import ClassVar

__all__ = ["LoadWeights", "WaveCall", "tells_following"]


@dataclasses.dataclass(frozen=True)
class LoadWeights:
    """Load a block of the source, or what is outside the blocks, for chunks that are there or on their way.

    Attributes:
        block: Index of the block; None for norm and head.
        unit: Name of the unit that the chunks are on their way for.
        comes_back: Whether gradients are to pass the block.
        beside: Number of workers that have loaded the same for the same chunks. So each has a call of its own, and
            failures of several workers are not taken for those of one call.
        was_foretold: Whether the worker was told before, so that it may have read the block already.
    """

    block: int | None
    unit: str
    comes_back: bool = False
    beside: int = 0
    was_foretold: bool = dataclasses.field(default=False, compare=False)
    verb: ClassVar[str] = "load weights"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WaveCall:
    """Says what weights a worker may read behind a call. Calls are not told apart by it.

    Attributes:
        following: Index of the block of the source that the worker will probably load next, whose weights it may read
            meanwhile; None where that is not known, or no block.
    """

    following: int | None = dataclasses.field(default=None, compare=False)


def tells_following(num_passed: int, num_chunks: int) -> bool:
    """Tell whether a call says which block follows: those of the second half of the chunks, and that of a single one.

    Early enough for the reading to take place behind many chunks, and late enough to know which worker will be where.

    Args:
        num_passed: Number of chunks that have passed the block before.
        num_chunks: Number of chunks that pass the block.
    """
    return 2 * (num_passed + 1) > num_chunks
