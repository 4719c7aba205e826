"""The calls that a schedule gives out, one class each. A call is what one worker does at a time.

Several calls make up a unit of the run. Round 0 calibrates on the stream `original`, and round r on the stream
`round-(r−1)`. After the last round only the held-out chunks travel, for the perplexity of the result.

    mode blocks      OpenBlock, Forward …, SolveBlock                       a block that one worker holds and solves
                     OpenBlock, Forward …, SplitBlock, parts …, WriteBlock  a block that it splits for others to help
                     OpenBlock, Forward …, FinishEvaluation                 a block of the result, only evaluated
    mode sequential  AccumulateHessians …, parts …, WriteBlock              stage by stage, by all workers
    parts            MergeHessians, TryBetas …, SolveRows …                 of each batch of a block that is split
    both             Embed, CopyTensors, ForwardChunk, EvaluateLoss
    token weights    ForwardChunk …, DifferentiateLoss, Backward …, WeighTokens …    before either, by the loss
"""

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

from astro_dist.schedule.names import (
    EMBED,
    LOSS_GRADIENT,
    block_unit,
    copy_index,
    copy_unit,
    evaluate_unit,
    head_unit,
    weights_unit,
)

__all__ = [
    "AccumulateHessians",
    "Backward",
    "BatchParts",
    "BlockParts",
    "Call",
    "CopyTensors",
    "DifferentiateLoss",
    "Embed",
    "EvaluateLoss",
    "FinishEvaluation",
    "FinishingCall",
    "Forward",
    "ForwardChunk",
    "HeldCall",
    "MergeHessians",
    "OpenBlock",
    "PartCall",
    "Result",
    "SolveBlock",
    "SolveRows",
    "SplitBlock",
    "TryBetas",
    "WeighTokens",
    "WeighingCall",
    "WriteBlock",
    "copy_calls",
]


@dataclasses.dataclass(frozen=True)
class Embed:
    """Make the hidden states before the first block, of every chunk."""

    verb: ClassVar[str] = "embed"

    @property
    def unit(self) -> str:
        """Return the name of the unit that the call belongs to."""
        return EMBED


@dataclasses.dataclass(frozen=True)
class CopyTensors:
    """Copy tensors from outside the blocks, as they are, into a shard of the result.

    Attributes:
        index: Index of the unit of copied tensors.
    """

    index: int
    verb: ClassVar[str] = "copy tensors"

    @property
    def unit(self) -> str:
        """Return the name of the unit that the call belongs to."""
        return copy_unit(self.index)


@dataclasses.dataclass(frozen=True)
class EvaluateLoss:
    """Measure the loss on the held-out chunks at the end of a stream.

    Attributes:
        stream: Name of the stream.
    """

    stream: str
    verb: ClassVar[str] = "evaluate loss"

    @property
    def unit(self) -> str:
        """Return the name of the unit that the call belongs to."""
        return head_unit(self.stream)


@dataclasses.dataclass(frozen=True)
class ForwardChunk:
    """Pass one chunk through a block that is not being quantized, and keep the output.

    Attributes:
        stream: Name of the stream that the chunk travels in.
        block: Index of the block.
        chunk: Name of the chunk.
        unit: Name of the unit that the call belongs to: the unit that makes the output where nothing is lost.
    """

    stream: str
    block: int
    chunk: str
    unit: str
    verb: ClassVar[str] = "forward chunk"


@dataclasses.dataclass(frozen=True)
class _RoundCall:
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
class OpenBlock(_RoundCall):
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
class Forward(_RoundCall):
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
class SolveBlock(_RoundCall):
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
class SplitBlock(_RoundCall):
    """Write the Hessians of the open block to files, so that several workers can solve it.

    The call returns `BlockParts`.
    """

    verb: ClassVar[str] = "split block"


@dataclasses.dataclass(frozen=True)
class FinishEvaluation(_RoundCall):
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
class MergeHessians(_RoundCall):
    """Add up the shares of a batch's Hessians, and decide what holds for all of its rows.

    Attributes:
        round_index: Index of the round.
        block: Index of the block.
        batch: Index of the batch. A batch consists of input groups that are solved side by side.
    """

    batch: int
    verb: ClassVar[str] = "merge Hessians"


@dataclasses.dataclass(frozen=True)
class TryBetas(_RoundCall):
    """Try every strength β of the regularization on one tile of a batch's sampled rows.

    Attributes:
        round_index: Index of the round.
        block: Index of the block.
        batch: Index of the batch.
        tile: Index of the tile among those of the sample.
    """

    batch: int
    tile: int
    verb: ClassVar[str] = "try betas"


@dataclasses.dataclass(frozen=True)
class SolveRows(_RoundCall):
    """Solve one tile of a batch's rows.

    Attributes:
        round_index: Index of the round.
        block: Index of the block.
        batch: Index of the batch.
        tile: Index of the tile among those of all rows.
    """

    batch: int
    tile: int
    verb: ClassVar[str] = "solve rows"


@dataclasses.dataclass(frozen=True)
class WriteBlock(_RoundCall):
    """Put the solved tiles of a block together and write its shard."""

    verb: ClassVar[str] = "write block"


@dataclasses.dataclass(frozen=True)
class DifferentiateLoss:
    """Compute the gradient of the loss with respect to the last block's output.

    Attributes:
        chunks: Names of the calibration chunks.
    """

    chunks: tuple[str, ...]
    verb: ClassVar[str] = "differentiate loss"

    @property
    def unit(self) -> str:
        """Return the name of the unit that the call belongs to."""
        return LOSS_GRADIENT


@dataclasses.dataclass(frozen=True)
class Backward:
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


HeldCall = OpenBlock | Forward | SolveBlock | SplitBlock | FinishEvaluation
"""The calls for a block that one worker keeps in its memory from the first of them to the last."""
PartCall = MergeHessians | TryBetas | SolveRows
"""The calls by which several workers solve a block."""
WeighingCall = DifferentiateLoss | Backward | WeighTokens
"""The calls that measure token weights by the loss."""
FinishingCall = Embed | CopyTensors | SolveBlock | WriteBlock | FinishEvaluation | EvaluateLoss | WeighTokens
"""The calls that finish a unit. Each of them writes the record of its unit last, and returns that record."""
Call = HeldCall | PartCall | FinishingCall | AccumulateHessians | ForwardChunk | WeighingCall
"""Everything that a worker can be asked to do."""


@dataclasses.dataclass(frozen=True)
class BatchParts:
    """Says how many calls a batch takes once its Hessians are merged.

    Attributes:
        batch: Index of the batch.
        sample_tiles: Number of `TryBetas` calls. All of them return before the first tile is solved.
        tiles: Number of `SolveRows` calls.
    """

    batch: int
    sample_tiles: int
    tiles: int


@dataclasses.dataclass(frozen=True)
class BlockParts:
    """Says how a block is cut for the calls that follow. `SplitBlock` and `AccumulateHessians` return it.

    Attributes:
        batches: Batches of the whole block, or of the stage that the call was for, the most urgent first.
        num_stages: Number of stages of the block; 0 where nothing of it is quantized.
    """

    batches: tuple[BatchParts, ...]
    num_stages: int = 1


Result = object
"""What a call returns. A schedule reads only `BlockParts`; the driver also reads the records of units, and seconds."""


def copy_calls(units: Iterable[str]) -> list[CopyTensors]:
    """Return a call for each of some units that copies tensors.

    Args:
        units: Names of units, of any kind.
    """
    indices = [copy_index(unit) for unit in units]
    return [CopyTensors(index) for index in indices if index is not None]
