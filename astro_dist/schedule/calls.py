"""The calls that a schedule hands to workers, one class each, and what a schedule is.

A schedule is pure: it is told what was finished and answers what a free worker shall do. A call is what one worker does
at a time; several calls make up a unit of the run. Round 0 calibrates on the stream `original`, round r on the stream
`round-(r−1)`; behind the last round only the held-out chunks travel, for the perplexity of the result.

    mode blocks      OpenBlock, Forward …, SolveBlock                       a block that one worker holds and solves
                     OpenBlock, Forward …, SplitBlock, parts …, WriteBlock  a block that it splits for others to help
                     OpenBlock, Forward …, FinishEvaluation                 a block of the result, only evaluated
    mode sequential  AccumulateHessians …, parts …, WriteBlock              stage by stage, by all workers
    parts            MergeHessians, TryBetas …, SolveRows …                 of each batch of a block that is split
    both             Embed, CopyTensors, ForwardChunk, EvaluateLoss
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import ClassVar, Protocol

from astro_dist.schedule.names import EMBED, block_unit, copy_index, copy_unit, evaluate_unit, head_unit

__all__ = [
    "AccumulateHessians",
    "BatchParts",
    "BlockParts",
    "Call",
    "CopyTensors",
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
    "Present",
    "Result",
    "Schedule",
    "SolveBlock",
    "SolveRows",
    "Spent",
    "SpentInputs",
    "SpentParts",
    "SpentShard",
    "SpentShares",
    "SplitBlock",
    "TryBetas",
    "WriteBlock",
    "assign",
    "copy_calls",
]

Present = Mapping[str, Mapping[int, Collection[str]]]
"""The chunks that are there as input of each block, by stream."""


@dataclasses.dataclass(frozen=True)
class Embed:
    """Make the hidden states before the first block, of every chunk."""

    verb: ClassVar[str] = "embed"

    @property
    def unit(self) -> str:
        """The unit that the call belongs to."""
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
        """The unit that the call belongs to."""
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
        """The unit that the call belongs to."""
        return head_unit(self.stream)


@dataclasses.dataclass(frozen=True)
class ForwardChunk:
    """Pass one chunk through a block that is not quantized at the same time, and keep the output.

    Attributes:
        stream: Name of the stream that the chunk travels in.
        block: Index of the block.
        chunk: Name of the chunk.
        unit: The unit that the call belongs to: the one that made, or would have made, the output in the first place.
    """

    stream: str
    block: int
    chunk: str
    unit: str
    verb: ClassVar[str] = "forward chunk"


@dataclasses.dataclass(frozen=True)
class _RoundCall:
    """A call for a block in a round.

    Attributes:
        round_index: Index of the round.
        block: Index of the block.
    """

    round_index: int
    block: int

    @property
    def place(self) -> tuple[int, int]:
        """The round and the block."""
        return self.round_index, self.block

    @property
    def unit(self) -> str:
        """The unit that the call belongs to."""
        return block_unit(self.round_index, self.block)


@dataclasses.dataclass(frozen=True)
class OpenBlock(_RoundCall):
    """Read the block that a worker will feed.

    Attributes:
        round_index: Index of the round; of the pass behind the last round, the number of rounds.
        block: Index of the block.
        evaluates: Whether the block is one of the result, which held-out chunks pass through to be measured on.
    """

    evaluates: bool = False
    verb: ClassVar[str] = "open block"

    @property
    def unit(self) -> str:
        """The unit that the call belongs to."""
        return evaluate_unit(self.block) if self.evaluates else block_unit(*self.place)


@dataclasses.dataclass(frozen=True)
class Forward(_RoundCall):
    """Pass one chunk through the block that a worker has opened.

    Attributes:
        round_index: Index of the round; of the pass behind the last round, the number of rounds.
        block: Index of the block.
        chunk: Name of the chunk.
        evaluates: Whether the block is one of the result, see `OpenBlock`.
    """

    chunk: str
    evaluates: bool = False
    verb: ClassVar[str] = "forward"

    @property
    def unit(self) -> str:
        """The unit that the call belongs to."""
        return evaluate_unit(self.block) if self.evaluates else block_unit(*self.place)


@dataclasses.dataclass(frozen=True)
class SolveBlock(_RoundCall):
    """Quantize the open block, which all chunks have passed, and write its shard."""

    verb: ClassVar[str] = "solve block"


@dataclasses.dataclass(frozen=True)
class SplitBlock(_RoundCall):
    """Hand the Hessians of the open block on, so that several workers can solve it. Returns `BlockParts`."""

    verb: ClassVar[str] = "split block"


@dataclasses.dataclass(frozen=True)
class FinishEvaluation(_RoundCall):
    """Close a block of the result that all held-out chunks have passed."""

    verb: ClassVar[str] = "finish evaluation"

    @property
    def unit(self) -> str:
        """The unit that the call belongs to."""
        return evaluate_unit(self.block)


@dataclasses.dataclass(frozen=True)
class AccumulateHessians:
    """Sum the Hessians of one stage of a block over one share of the calibration chunks. Returns `BlockParts`.

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
        """The unit that the call belongs to."""
        return block_unit(0, self.block)


@dataclasses.dataclass(frozen=True)
class MergeHessians(_RoundCall):
    """Add up the shares of a batch's Hessians, and decide what holds for all of its rows.

    Attributes:
        round_index: Index of the round.
        block: Index of the block.
        batch: Index of the batch: input groups that are solved side by side.
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


HeldCall = OpenBlock | Forward | SolveBlock | SplitBlock | FinishEvaluation
"""The calls of a block that one worker has in hand from the first to the last."""
PartCall = MergeHessians | TryBetas | SolveRows
"""The calls by which several workers solve a block."""
FinishingCall = Embed | CopyTensors | SolveBlock | WriteBlock | FinishEvaluation | EvaluateLoss
"""The calls that finish a unit: its record is the last thing that they write, and what they return."""
Call = HeldCall | PartCall | FinishingCall | AccumulateHessians | ForwardChunk
"""Whatever a worker can be asked to do."""


@dataclasses.dataclass(frozen=True)
class BatchParts:
    """The calls that a batch takes once its Hessians are merged.

    Attributes:
        batch: Index of the batch.
        sample_tiles: Number of `TryBetas` calls; all of them are done before the first tile is solved.
        tiles: Number of `SolveRows` calls.
    """

    batch: int
    sample_tiles: int
    tiles: int


@dataclasses.dataclass(frozen=True)
class BlockParts:
    """What `SplitBlock` and `AccumulateHessians` return: how the block is cut for the calls that follow.

    Attributes:
        batches: The batches, of the whole block or of the stage that was asked for, the most urgent first.
        num_stages: Number of stages of the block; 0 where nothing of it is quantized.
    """

    batches: tuple[BatchParts, ...]
    num_stages: int = 1


Result = object
"""What a call returns. A schedule reads `BlockParts` alone; the driver knows the records of units, and seconds."""


@dataclasses.dataclass(frozen=True)
class SpentInputs:
    """The inputs of a block in a stream.

    Attributes:
        block: Index of the block.
        stream: Name of the stream.
    """

    block: int
    stream: str


@dataclasses.dataclass(frozen=True)
class SpentShard:
    """The shard of a block that an earlier round wrote.

    Attributes:
        round_index: Index of that round.
        block: Index of the block.
    """

    round_index: int
    block: int


@dataclasses.dataclass(frozen=True)
class SpentShares:
    """The shares of the Hessians of a batch, in mode `sequential`.

    Attributes:
        block: Index of the block.
        batch: Index of the batch.
    """

    block: int
    batch: int


@dataclasses.dataclass(frozen=True)
class SpentParts:
    """Everything that workers handed each other to solve a block.

    Attributes:
        round_index: Index of the round.
        block: Index of the block.
    """

    round_index: int
    block: int


Spent = SpentInputs | SpentShard | SpentShares | SpentParts
"""Files that no unfinished unit needs any more. Only the driver deletes: a worker that was given up for dead may still
be at work on what another has taken over."""


class Schedule(Protocol):
    """The state of a run, and who does what next.

    Attributes:
        finished: Names of the units that are finished.
    """

    finished: set[str]

    @property
    def complete(self) -> bool:
        """Whether every unit is finished."""

    @property
    def units(self) -> list[str]:
        """The name of every unit."""

    def next_call(self, worker: int, idle: int = 0) -> Call | None:
        """Say what a free worker shall do now.

        Args:
            worker: Number of the worker.
            idle: Number of other workers that have nothing to do.

        Returns:
            The call, which the schedule takes to be made; None where the worker must wait for another one.
        """

    def done(self, worker: int, call: Call, result: Result) -> list[Spent]:
        """Take note that a call returned.

        Args:
            worker: Number of the worker.
            call: The call.
            result: What it returned.

        Returns:
            What is not needed any more.
        """

    def failed(self, worker: int, call: Call) -> None:
        """Take note that a call came to nothing, and that the worker has lost what it held."""

    def holds(self, worker: int) -> bool:
        """Tell whether a worker has something in hand that only it can go on with.

        What a worker with empty hands cannot get, no other such worker can.
        """


def assign(schedule: Schedule, workers: Iterable[int]) -> Iterator[tuple[int, Call]]:
    """Say what each of some free workers shall do now.

    Args:
        schedule: The state of the run.
        workers: Numbers of the free workers.

    Yields:
        A worker and its call; workers that must wait are left out.
    """
    idle = 0
    for worker in sorted(workers, key=lambda worker: (schedule.holds(worker), worker)):
        holds = schedule.holds(worker)
        if idle and not holds:
            idle += 1
            continue
        call = schedule.next_call(worker, idle)
        if call is not None:
            yield worker, call
        elif not holds:
            idle += 1


def copy_calls(units: Iterable[str]) -> list[CopyTensors]:
    """Pick the units that copy tensors from some units; the calls that do them."""
    indices = [copy_index(unit) for unit in units]
    return [CopyTensors(index) for index in indices if index is not None]
