"""The schedule of mode `sequential`: all workers serve one block, and the next is calibrated on its quantized form.

A block is solved in stages. A stage consists of one input group, which are layers that read the same input, or of
several input groups side by side, such as those of all experts.
"""

from collections.abc import Sequence

from astro.linalg.tiling import cut
from astro_dist.schedule.calls import (
    AccumulateHessians,
    BatchCall,
    BlockParts,
    Call,
    Embed,
    EvaluateLoss,
    ForwardChunk,
    MergeHessians,
    Result,
    WriteBlock,
    copy_calls,
)
from astro_dist.schedule.names import (
    EMBED,
    ORIGINAL,
    STREAMS,
    block_unit,
    head_unit,
    is_held_out,
    round_stream,
    sequential_units,
)
from astro_dist.schedule.pending_calls import PendingCalls
from astro_dist.schedule.schedule import NOTHING_DONE, RunShape, StartingPoint
from astro_dist.schedule.spent import Spent, SpentInputs, SpentParts, SpentShares

__all__ = ["SequentialSchedule", "shares"]

_RESULT = round_stream(0)


def shares(chunks: Sequence[str], count: int) -> list[list[str]]:
    """Cut the calibration chunks into contiguous shares of sizes that differ by one at most.

    Args:
        chunks: Names of the chunks in the order in which they travel. Those that are held out are left out.
        count: Number of shares; there are fewer where there are fewer chunks.

    Returns:
        Names of the chunks of each share.
    """
    calibration = [chunk for chunk in chunks if not is_held_out(chunk)]
    return [calibration[part] for part in cut(len(calibration), count)]


class SequentialSchedule:
    """Holds the state of a run in mode `sequential`, and decides what each worker does next.

    The diagram shows the path of one block through its stages, as `next_call` gives out the calls:

        ┌──────────────────── for each stage of the block ────────────────────┐
        AccumulateHessians ──▶ MergeHessians ──▶ TryBetas ───────▶ SolveRows ───▶ WriteBlock ──▶ ForwardChunk
        one for each share     one for each      one for each      one for       one for the   one for each
        of the chunks          batch of the      tile of the       each tile     block         chunk, whose output
                               stage             batch's sample,   of the                      is the input of the
                                                 if β is searched  batch's rows                next block

    Where errors are corrected, Reconstruct follows the last SolveRows of a batch, one for all rows of the batch.

    A share is accumulated as soon as all of its chunks are there. MergeHessians waits for all shares of the stage. From
    there on each batch goes its own way: it waits until its own calls of one kind have returned before the next kind
    begins. The next stage waits for all batches of the stage before, and WriteBlock for the last stage. Of a block that
    is not finished nothing is kept when a run goes on: it begins again with its first stage.

    Attributes:
        units: Names of all units of the run.
        finished: Names of the units that are finished.
    """

    def __init__(
        self,
        shape: RunShape,
        num_shares: int,
        start: StartingPoint = NOTHING_DONE,
        compensated: bool = False,
    ) -> None:
        """Begin a run, or go on with it.

        Args:
            shape: Size of the run.
            num_shares: Number of shares that the calibration chunks are cut into.
            start: What of the run is done already. The files of all finished units are there.
            compensated: Whether the calibration chunks pass through the source's blocks too.
        """
        self._num_blocks = shape.num_blocks
        self._compensated = compensated
        self._chunks = list(shape.chunks)
        self._held_out = [name for name in shape.chunks if is_held_out(name)]
        self._shares = shares(shape.chunks, num_shares)
        self.units = sequential_units(shape.num_blocks, shape.num_copies, bool(self._held_out))
        self.finished = set(start.finished) & set(self.units)
        self._ready = {
            (stream, block): set(start.present.get(stream, {}).get(block, ()))
            for stream in STREAMS
            for block in range(shape.num_blocks + 1)
        }
        self._before_current = 0
        self._reopen()
        self._stages: dict[int, int] = {}
        self._solving: dict[tuple[int, int], PendingCalls] = {}  # by block and stage
        self._by_batch: dict[tuple[int, int], PendingCalls] = {}  # the same by block and batch
        self._done: set[Call] = set()
        self._taken: set[Call] = set()

    @property
    def complete(self) -> bool:
        """Tell whether every unit is finished."""
        return len(self.finished) == len(self.units)

    def next_call(self, worker: int, idle: int = 0) -> Call | None:
        """Decide what a free worker does now; see `Schedule`."""
        for call in self._candidates():
            if call not in self._taken:
                self._taken.add(call)
                return call
        return None

    def done(self, worker: int, call: Call, result: Result) -> list[Spent]:
        """Take note that a call returned; see `Schedule`."""
        self._done.add(call)
        match call:
            case ForwardChunk():
                self._ready[call.stream, call.block + 1].add(call.chunk)
            case AccumulateHessians(block, stage):
                assert isinstance(result, BlockParts)
                self._stages[block] = result.num_stages
                solving = self._solving.setdefault((block, stage), PendingCalls((0, block), result.batches))
                self._by_batch |= {(block, batch): solving for batch in solving.batches}
            case BatchCall():
                self._by_batch[call.block, call.batch].done(call)
            case _:
                self.finished.add(call.unit)
        if isinstance(call, Embed):
            for stream in STREAMS:
                self._ready[stream, 0].update(self._chunks)
        return self._spent(call)

    def holds(self, worker: int) -> bool:
        """Tell whether a worker has a block open, which none has in this mode; see `Schedule`."""
        return False

    def failed(self, worker: int, call: Call) -> None:
        """Take note that a call came to nothing; see `Schedule`. The worker has lost nothing else."""
        self._taken.discard(call)

    def _spent(self, call: Call) -> list[Spent]:
        """The files that nothing needs any more once a call has returned."""
        match call:
            case MergeHessians():
                return self._spent_shares(call)
            case WriteBlock(_, block):
                before = [SpentInputs(block - 1, stream) for stream in STREAMS] if block else []
                return [SpentParts(0, block), *before]
            case EvaluateLoss() if self._has_compared:
                return [SpentInputs(self._num_blocks, stream) for stream in STREAMS]
        return []

    @property
    def _has_compared(self) -> bool:
        """Whether the held-out chunks of both streams are done with: the result is compared with the source."""
        return all(head_unit(stream) in self.finished for stream in STREAMS)

    @property
    def _current(self) -> int:
        """The first block that is not finished."""
        while self._before_current < self._num_blocks and block_unit(0, self._before_current) in self.finished:
            self._before_current += 1
        return self._before_current

    def _candidates(self) -> list[Call]:
        """The calls that can begin, because their inputs are there, the most urgent first."""
        copying = copy_calls(unit for unit in self.units if unit not in self.finished)
        if EMBED not in self.finished:
            return [Embed(), *copying]
        through_result, through_source = (self._passes(stream) for stream in (_RESULT, ORIGINAL))
        # The tensors of the head may be among those that are copied.
        quantizing = self._quantize(self._current, bool(through_result or through_source))
        return [*through_result, *quantizing, *through_source, *copying, *self._losses()]

    def _passes(self, stream: str) -> list[ForwardChunk]:
        """A call for each chunk that is to pass its next block, from the furthest block whose input of it is there."""
        calls = []
        goals = {held_out: self._goals(stream, held_out) for held_out in (False, True)}
        for chunk in self._chunks:
            goal = next((g for g in goals[is_held_out(chunk)] if chunk not in self._ready[stream, g]), None)
            place = self._place(stream, chunk, goal) if goal else None
            if place is not None:
                calls.append(ForwardChunk(stream, place, chunk, block_unit(0, place)))
        return calls

    def _goals(self, stream: str, held_out: bool) -> list[int]:
        """The blocks whose inputs are wanted, the most urgent first: the current one, and the furthest in reach."""
        target = self._target(stream, held_out)
        return [self._current, target] if target > self._current and not held_out else [target]

    def _target(self, stream: str, held_out: bool) -> int:
        """The furthest block that chunks are wanted at and can reach now; 0 where they are not wanted any more."""
        current = self._current
        if held_out:
            wanted = 0 if self._has_compared else self._num_blocks
        else:
            calibrates = current < self._num_blocks and (stream == _RESULT or self._compensated)
            wanted = self._num_blocks - 1 if calibrates else 0
        # The blocks of the result are there up to the current one. Those of the source could all be passed at once, but
        # the inputs of each block take space.
        return min(wanted, current if stream == _RESULT else current + 1)

    def _place(self, stream: str, chunk: str, target: int) -> int | None:
        """The furthest block up to the target whose input of a chunk is there."""
        return next((b for b in range(target, -1, -1) if chunk in self._ready[stream, b]), None)

    def _quantize(self, block: int, chunks_on_their_way: bool) -> list[Call]:
        """The calls that can be made for a block: those of its first unsolved stage, or the one that writes it."""
        if block == self._num_blocks:
            return []
        ready = self._ready[_RESULT, block]
        if self._compensated:
            ready = ready & self._ready[ORIGINAL, block]
        for stage in range(self._stages.get(block, 1)):
            sharing = [AccumulateHessians(block, stage, share) for share in range(len(self._shares))]
            if not self._done.issuperset(sharing):
                return [call for call in sharing if ready.issuperset(self._shares[call.share])]
            left = self._solving[block, stage].left if (block, stage) in self._solving else None
            if left:
                return list(left)
        # Writing the shard spends the inputs of the block before, which chunks on their way may still need.
        return [] if chunks_on_their_way else [WriteBlock(0, block)]

    def _spent_shares(self, call: MergeHessians) -> list[Spent]:
        """The shares of a stage, once all of its batches are merged: an expert may need the shares of another one."""
        solving = self._by_batch[call.block, call.batch]
        return [] if solving.unmerged else [SpentShares(call.block, batch) for batch in solving.batches]

    def _losses(self) -> list[EvaluateLoss]:
        """A call for each stream whose held-out chunks have all passed the last block, as those of the source have."""
        if not self._held_out or not self._passed_through(ORIGINAL):
            return []
        ended = [stream for stream in STREAMS if self._passed_through(stream)]
        return [EvaluateLoss(stream) for stream in ended if head_unit(stream) not in self.finished]

    def _passed_through(self, stream: str) -> bool:
        return self._ready[stream, self._num_blocks].issuperset(self._held_out)

    def _reopen(self) -> None:
        """Let the embeddings be made again where a chunk is still wanted and none of its hidden states are there."""
        for stream in STREAMS:
            for chunk in self._chunks:
                for goal in self._goals(stream, is_held_out(chunk)):
                    wanted = goal > 0 or self._current == 0
                    if wanted and self._place(stream, chunk, goal) is None:
                        self.finished.discard(EMBED)
