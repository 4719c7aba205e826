"""How a block is cut into parts that several workers solve."""

import dataclasses

__all__ = ["BatchParts", "BlockParts"]


@dataclasses.dataclass(frozen=True)
class BatchParts:
    """Says how many calls a batch takes once its Hessians are merged.

    Attributes:
        batch: Index of the batch.
        sample_tiles: Number of `TryBetas` calls. All of them return before the first tile is solved.
        tiles: Number of `SolveRows` calls.
        is_corrected: Whether a `Reconstruct` call follows them.
    """

    batch: int
    sample_tiles: int
    tiles: int
    is_corrected: bool = False


@dataclasses.dataclass(frozen=True)
class BlockParts:
    """Says how a block is cut for the calls that follow. `SplitBlock` and `AccumulateHessians` return it.

    Attributes:
        batches: Batches of the whole block, or of the stage that the call was for, the most urgent first.
        num_stages: Number of stages of the block; 0 where nothing of it is quantized.
    """

    batches: tuple[BatchParts, ...]
    num_stages: int = 1
