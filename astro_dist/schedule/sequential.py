"""Mode `sequential`: all workers serve one block, and the next is calibrated on what it wrote.

A block is solved in stages: one group of layers that share an input, or such groups of all experts. For each stage:
shares of the calibration chunks give partial Hessians, in any order; for each group one worker sums them and decides
what holds for all rows; where β is searched, tiles of the sampled rows are weighed; then tiles of all rows are solved.
At the end one worker writes the shard, and every chunk goes on through the block as it was written. Pure, as every
schedule.
"""

from collections.abc import Collection, Sequence

from astro.linalg.tiling import cut
from astro_dist.schedule.calls import (
    AccumulateHessians,
    BlockParts,
    Call,
    Embed,
    EvaluateLoss,
    ForwardChunk,
    MergeHessians,
    Present,
    Result,
    SolveRows,
    Spent,
    SpentInputs,
    SpentParts,
    SpentShares,
    TryBetas,
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

__all__ = ["SequentialSchedule", "shares"]

_RESULT = round_stream(0)


def shares(chunks: Sequence[str], count: int) -> list[list[str]]:
    """Calibration chunks in `count` contiguous shares, as even as can be; fewer where there are fewer chunks."""
    calibration = [chunk for chunk in chunks if not is_held_out(chunk)]
    return [calibration[part] for part in cut(len(calibration), count)]


class SequentialSchedule:
    """The state of a run in mode `sequential`.

    The calls of a block, in the order in which they return. What is not finished of a block is begun anew when a run
    goes on.

        AccumulateHessians ──▶ MergeHessians ──▶ TryBetas ──▶ SolveRows ──▶ WriteBlock ──▶ ForwardChunk
        once for a share       once for a        where β is   once for a    once for the   once for a chunk,
           ▲                   batch             searched     tile          block          to the next block
           └──────────────── next stage ─────────────────────────┘
    """

    def __init__(
        self,
        num_blocks: int,
        num_copies: int,
        chunks: Sequence[str],
        num_shares: int,
        finished: Collection[str],
        present: Present,
        compensated: bool = False,
    ) -> None:
        """Begin a run, or go on with it.

        Args:
            num_blocks: Number of blocks of the model.
            num_copies: Number of units of copied tensors.
            chunks: Names of the chunks in the order in which they travel.
            num_shares: Number of shares that the calibration chunks are cut into.
            finished: Names of the units that are finished, their files in place.
            present: The chunks that are there as input of each block.
            compensated: Whether the calibration chunks pass through the source's blocks too.
        """
        self._num_blocks = num_blocks
        self._compensated = compensated
        self._chunks = list(chunks)
        self._held_out = [name for name in chunks if is_held_out(name)]
        self._shares = shares(chunks, num_shares)
        self.units = sequential_units(num_blocks, num_copies, bool(self._held_out))
        self.finished = set(finished) & set(self.units)
        self._ready = {
            (stream, block): set(present.get(stream, {}).get(block, ()))
            for stream in STREAMS
            for block in range(num_blocks + 1)
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
        """Whether every unit is finished."""
        return len(self.finished) == len(self.units)

    def next_call(self, worker: int, idle: int = 0) -> Call | None:
        """Say what a free worker shall do now; see `Schedule`."""
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
            case MergeHessians() | TryBetas() | SolveRows():
                self._by_batch[call.block, call.batch].done(call)
            case _:
                self.finished.add(call.unit)
        if isinstance(call, Embed):
            for stream in STREAMS:
                self._ready[stream, 0].update(self._chunks)
        return self._spent(call)

    def holds(self, worker: int) -> bool:
        """Whether a worker has something in hand that only it can go on with: never in this mode."""
        return False

    def failed(self, worker: int, call: Call) -> None:
        """Take note that a call came to nothing; no worker holds anything from one call to the next."""
        self._taken.discard(call)

    def _spent(self, call: Call) -> list[Spent]:
        """What nothing needs any more once a call has returned."""
        match call:
            case MergeHessians():
                return self._spent_shares(call)
            case WriteBlock(_, block):
                before = [SpentInputs(block - 1, stream) for stream in STREAMS] if block else []
                return [SpentParts(0, block), *before]
            case EvaluateLoss():
                return [SpentInputs(self._num_blocks, call.stream)]
        return []

    @property
    def _current(self) -> int:
        """The first block that is not finished."""
        while self._before_current < self._num_blocks and block_unit(0, self._before_current) in self.finished:
            self._before_current += 1
        return self._before_current

    def _candidates(self) -> list[Call]:
        """Calls whose inputs are there, the most urgent first."""
        copying = copy_calls(unit for unit in self.units if unit not in self.finished)
        if EMBED not in self.finished:
            return [Embed(), *copying]
        behind, side = (self._passes(stream) for stream in (_RESULT, ORIGINAL))
        # The head may be among what was copied.
        return [*behind, *self._quantize(self._current, bool(behind or side)), *side, *copying, *self._losses()]

    def _passes(self, stream: str) -> list[ForwardChunk]:
        """Chunks that shall go through the next block on their way, each from the furthest it has come."""
        calls = []
        goals = {held_out: self._goals(stream, held_out) for held_out in (False, True)}
        for chunk in self._chunks:
            goal = next((g for g in goals[is_held_out(chunk)] if chunk not in self._ready[stream, g]), None)
            place = self._place(stream, chunk, goal) if goal else None
            if place is not None:
                calls.append(ForwardChunk(stream, place, chunk, block_unit(0, place)))
        return calls

    def _goals(self, stream: str, held_out: bool) -> list[int]:
        """Blocks whose inputs are wanted, the most urgent first: the current one's, then how far the way is open."""
        target = self._target(stream, held_out)
        return [self._current, target] if target > self._current and not held_out else [target]

    def _target(self, stream: str, held_out: bool) -> int:
        """The block that chunks are wanted at, as far as their way is open; 0 where they are not wanted any more."""
        current = self._current
        if held_out:
            wanted = self._num_blocks if head_unit(stream) not in self.finished else 0
        else:
            calibrates = current < self._num_blocks and (stream == _RESULT or self._compensated)
            wanted = self._num_blocks - 1 if calibrates else 0
        # The result's blocks are there up to the current one. The source's could all be passed at once, but what is
        # kept for each block costs space.
        return min(wanted, current if stream == _RESULT else current + 1)

    def _place(self, stream: str, chunk: str, target: int) -> int | None:
        """The furthest block up to the target whose input of a chunk is there."""
        return next((b for b in range(target, -1, -1) if chunk in self._ready[stream, b]), None)

    def _quantize(self, block: int, chunks_behind: bool) -> list[Call]:
        """For each stage shares, a decision, its parts; then the shard of the block that is next."""
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
        # Writing the shard drops the inputs of the block before, which chunks on their way may still need.
        return [] if chunks_behind else [WriteBlock(0, block)]

    def _spent_shares(self, call: MergeHessians) -> list[Spent]:
        """Once all batches of a stage are merged nothing needs its shares any more; experts may need each other's."""
        solving = self._by_batch[call.block, call.batch]
        return [] if solving.unmerged else [SpentShares(call.block, batch) for batch in solving.batches]

    def _losses(self) -> list[EvaluateLoss]:
        """The streams whose held-out chunks have all come to their end."""
        ended = [stream for stream in STREAMS if self._held_out and self._passed_through(stream)]
        return [EvaluateLoss(stream) for stream in ended if head_unit(stream) not in self.finished]

    def _passed_through(self, stream: str) -> bool:
        return self._ready[stream, self._num_blocks].issuperset(self._held_out)

    def _reopen(self) -> None:
        """Begin again with the embeddings where a chunk that is still wanted is nowhere on its way."""
        for stream in STREAMS:
            for chunk in self._chunks:
                for goal in self._goals(stream, is_held_out(chunk)):
                    wanted = goal > 0 or self._current == 0
                    if wanted and self._place(stream, chunk, goal) is None:
                        self.finished.discard(EMBED)
