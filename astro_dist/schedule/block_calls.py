"""The calls that quantize or evaluate one block."""

import dataclasses
from typing import ClassVar

from astro_dist.schedule.names import block_unit, evaluate_unit

__all__ = [
    "AccumulateHessians",
    "BatchCall",
    "FinishEvaluation",
    "Forward",
    "MergeHessians",
    "OpenBlock",
    "Reconstruct",
    "SolveBlock",
    "SolveRows",
    "SplitBlock",
    "TryBetas",
    "WriteBlock",
]


@dataclasses.dataclass(frozen=True)
class RoundCall:
    """The call concerns one block in one round.

    Attributes:
        round_index: Index of the round.
        block: Index of the block.
    """

    round_index: int
    block: int

    @property
    def place(self) -> tuple[int, int]:
        """Return the round and the block."""
        return self.round_index, self.block

    @property
    def unit(self) -> str:
        """Return the name of the unit that the call belongs to."""
        return block_unit(self.round_index, self.block)


@dataclasses.dataclass(frozen=True)
class OpenBlock(RoundCall):
    """Read a block, which the worker then feeds with chunks.

    Attributes:
        round_index: Index of the round; the number of rounds for the pass after the last round.
        block: Index of the block.
        evaluates: Whether the block is one of the result, which only held-out chunks pass through.
        was_foretold: Whether the worker was told before, so that it may have read the block already.
    """

    evaluates: bool = False
    was_foretold: bool = dataclasses.field(default=False, compare=False)
    verb: ClassVar[str] = "open block"

    @property
    def unit(self) -> str:
        """Return the name of the unit that the call belongs to."""
        return evaluate_unit(self.block) if self.evaluates else block_unit(*self.place)


@dataclasses.dataclass(frozen=True)
class Forward(RoundCall):
    """Pass one chunk through the block that a worker has opened.

    Attributes:
        round_index: Index of the round; the number of rounds for the pass after the last round.
        block: Index of the block.
        chunk: Name of the chunk.
        evaluates: Whether the block is one of the result; see `OpenBlock`.
    """

    chunk: str
    evaluates: bool = False
    verb: ClassVar[str] = "forward"

    @property
    def unit(self) -> str:
        """Return the name of the unit that the call belongs to."""
        return evaluate_unit(self.block) if self.evaluates else block_unit(*self.place)


@dataclasses.dataclass(frozen=True)
class SolveBlock(RoundCall):
    """Quantize the open block, which all chunks have passed, and write its shard.

    Attributes:
        round_index: Index of the round.
        block: Index of the block.
        following: Index of the block of the source that the worker will probably open next, whose weights it may read
            meanwhile; None where nothing is foretold.
    """

    following: int | None = dataclasses.field(default=None, compare=False)
    verb: ClassVar[str] = "solve block"


@dataclasses.dataclass(frozen=True)
class SplitBlock(RoundCall):
    """Write the Hessians of the open block to files, so that several workers can solve it.

    The call returns `BlockParts`.
    """

    verb: ClassVar[str] = "split block"


@dataclasses.dataclass(frozen=True)
class FinishEvaluation(RoundCall):
    """Close a block of the result that all held-out chunks have passed."""

    verb: ClassVar[str] = "finish evaluation"

    @property
    def unit(self) -> str:
        """Return the name of the unit that the call belongs to."""
        return evaluate_unit(self.block)


@dataclasses.dataclass(frozen=True)
class AccumulateHessians:
    """Sum the Hessians of one stage of a block over one share of the calibration chunks.

    The call returns `BlockParts`.

    Attributes:
        block: Index of the block.
        stage: Index of the stage of the block's forward.
        share: Index of the share of the chunks.
    """

    block: int
    stage: int
    share: int
    verb: ClassVar[str] = "accumulate Hessians"

    @property
    def unit(self) -> str:
        """Return the name of the unit that the call belongs to."""
        return block_unit(0, self.block)


@dataclasses.dataclass(frozen=True)
class BatchCall(RoundCall):
    """The call concerns one batch of a block that is solved in parts.

    Attributes:
        round_index: Index of the round.
        block: Index of the block.
        batch: Index of the batch. A batch consists of input groups that are solved side by side.
    """

    batch: int


@dataclasses.dataclass(frozen=True)
class TileCall(BatchCall):
    """The call concerns one tile of a batch's rows.

    Attributes:
        round_index: Index of the round.
        block: Index of the block.
        batch: Index of the batch.
        tile: Index of the tile, among those of the sample or among those of all rows.
    """

    tile: int


@dataclasses.dataclass(frozen=True)
class MergeHessians(BatchCall):
    """Add up the shares of a batch's Hessians, and decide what holds for all of its rows."""

    verb: ClassVar[str] = "merge Hessians"


@dataclasses.dataclass(frozen=True)
class TryBetas(TileCall):
    """Try every strength β of the regularization on one tile of a batch's sampled rows."""

    verb: ClassVar[str] = "try betas"


@dataclasses.dataclass(frozen=True)
class SolveRows(TileCall):
    """Solve one tile of a batch's rows."""

    verb: ClassVar[str] = "solve rows"


@dataclasses.dataclass(frozen=True)
class Reconstruct(BatchCall):
    """Correct what the solve of a batch's rows, all of them, leaves of errors."""

    verb: ClassVar[str] = "reconstruct"


@dataclasses.dataclass(frozen=True)
class WriteBlock(RoundCall):
    """Put the solved tiles of a block together and write its shard."""

    verb: ClassVar[str] = "write block"
