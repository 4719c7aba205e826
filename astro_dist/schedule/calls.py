"""The calls that a schedule gives out, one class each. A call is what one worker does at a time.

Those for one block, those that weigh tokens and those that smooth inputs have modules of their own; all of them are to
be had from here.

Several calls make up a unit of the run. Round 0 calibrates on the stream `original`, and round r on the stream
`round-(r−1)`. After the last round only the held-out chunks travel, for the perplexity of the result.

    mode blocks      OpenBlock, Forward …, SolveBlock                       a block that one worker holds and solves
                     OpenBlock, Forward …, SplitBlock, parts …, WriteBlock  a block that it splits for others to help
                     OpenBlock, Forward …, FinishEvaluation                 a block of the result, only evaluated
    mode stages      as in mode blocks, but for SplitBlock
    mode sequential  AccumulateHessians …, parts …, WriteBlock              stage by stage, by all workers
    parts            MergeHessians, TryBetas …, SolveRows …, Reconstruct    of each batch of a block that is split
    all modes        Embed, CopyTensors, ForwardChunk, EvaluateLoss
    smoothing        MeasureChannels …, SmoothChannels                      before all others, where inputs are smoothed
    token weights    LoadWeights, ForwardChunk …                            before a mode, by the loss; each begins with
                     LoadWeights, DifferentiateLoss …                       LoadWeights where a worker comes to another
                     LoadWeights, Backward …, WeighTokens                   block, or to the head
"""

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

from astro_dist.schedule.block_calls import (
    AccumulateHessians,
    BatchCall,
    FinishEvaluation,
    Forward,
    MergeHessians,
    OpenBlock,
    Reconstruct,
    SolveBlock,
    SolveRows,
    SplitBlock,
    TryBetas,
    WriteBlock,
)
from astro_dist.schedule.block_parts import BatchParts, BlockParts
from astro_dist.schedule.names import EMBED, copy_index, copy_unit, head_unit
from astro_dist.schedule.smoothing_calls import MeasureChannels, SmoothChannels
from astro_dist.schedule.wave_call import LoadWeights, WaveCall
from astro_dist.schedule.weighing_calls import Backward, DifferentiateLoss, WeighTokens

__all__ = [
    "AccumulateHessians",
    "Backward",
    "BatchCall",
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
    "LoadWeights",
    "MeasureChannels",
    "MergeHessians",
    "OpenBlock",
    "PartCall",
    "Reconstruct",
    "Result",
    "SmoothChannels",
    "SmoothingCall",
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
class ForwardChunk(WaveCall):
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


HeldCall = OpenBlock | Forward | SolveBlock | SplitBlock | FinishEvaluation
"""The calls for a block that one worker keeps in its memory from the first of them to the last."""
PartCall = MergeHessians | TryBetas | SolveRows | Reconstruct
"""The calls by which several workers solve a block."""
WeighingCall = LoadWeights | DifferentiateLoss | Backward | WeighTokens
"""The calls that measure token weights by the loss."""
SmoothingCall = MeasureChannels | SmoothChannels
"""The calls that find out how inputs are smoothed."""
FinishingCall = (
    Embed | CopyTensors | SolveBlock | WriteBlock | FinishEvaluation | EvaluateLoss | WeighTokens | SmoothChannels
)
"""The calls that finish a unit. Each of them writes the record of its unit last, and returns that record."""
Call = HeldCall | PartCall | FinishingCall | AccumulateHessians | ForwardChunk | WeighingCall | MeasureChannels
"""Everything that a worker can be asked to do."""


Result = object
"""What a call returns. A schedule reads only `BlockParts`; the driver also reads the records of units, and seconds."""


def copy_calls(units: Iterable[str]) -> list[CopyTensors]:
    """Return a call for each of some units that copies tensors.

    Args:
        units: Names of units, of any kind.
    """
    indices = [copy_index(unit) for unit in units]
    return [CopyTensors(index) for index in indices if index is not None]
