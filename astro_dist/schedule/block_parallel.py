"""Mode `blocks`: every block on its own, in one or more rounds. Pure, as every schedule."""

from collections.abc import Collection, Iterator, Sequence

from astro_dist.schedule.block_state import RoundBlock, State
from astro_dist.schedule.calls import (
    BlockParts,
    Call,
    Embed,
    EvaluateLoss,
    FinishEvaluation,
    Forward,
    ForwardChunk,
    MergeHessians,
    OpenBlock,
    Present,
    Result,
    SolveBlock,
    SolveRows,
    Spent,
    SpentInputs,
    SpentParts,
    SpentShard,
    SplitBlock,
    TryBetas,
    WriteBlock,
    copy_calls,
)
from astro_dist.schedule.names import (
    EMBED,
    block_unit,
    evaluate_unit,
    head_unit,
    is_held_out,
    stream_names,
    unit_names,
)
from astro_dist.schedule.pending_calls import PendingCalls

__all__ = ["BlockSchedule"]


class BlockSchedule:
    """The state of a run in mode `blocks`.

    A block is opened by one worker, fed with its input chunks as the block before it produces them, and solved there
    while other workers already feed the next blocks. A block of a later round waits for nothing but its inputs and its
    own result of the round before, so rounds follow each other without a gap. Where other workers have nothing to do
    when a block is to be solved, it is split: they solve its input groups, tile by tile of their rows. It comes to the
    same bytes. Behind the last round the held-out chunks make one more pass, through the blocks of the result, from
    block to block as all others do, so that no chunk waits for the chunks after it.

    The states of a block in a round, and the calls that lead from one to the next when they return:

                 is handed out      OpenBlock        SolveBlock, or FinishEvaluation behind the last round
        WAITING ──────────────▶ OPENING ─────▶ FEEDING ──────────────────────────────────────────▶ FINISHED
           ▲                       │            │    │ SplitBlock                                     ▲
           │    worker lost, or    │            │    ▼               WriteBlock                       │
           └──── gives it up ──────┴────────────┘  SPLIT ─────────────────────────────────────────────┘
                                                     ↺ MergeHessians, TryBetas, SolveRows

    OPENING and FEEDING have a worker that holds the block. The others have none, so that a lost worker costs a block
    that is split no more than the part that it was at. A block whose worker was lost begins anew with the next worker
    that is free. Where none is, because all of them wait for what it hands on, the worker at the furthest block gives
    its own up for it.
    """

    def __init__(
        self,
        num_blocks: int,
        num_copies: int,
        chunks: Sequence[str],
        finished: Collection[str],
        present: Present,
        rounds: int = 1,
        written: Collection[str] | None = None,
        measured_first: bool = False,
    ) -> None:
        """Begin a run, or go on with it.

        Args:
            num_blocks: Number of blocks of the model.
            num_copies: Number of units of copied tensors.
            chunks: Names of the chunks in the order in which they travel; see `is_held_out`.
            finished: Names of the units that are finished.
            present: The chunks that are there as input of each block.
            rounds: Number of passes over the model.
            written: The finished units whose files are still there; all of them where not given.
            measured_first: Whether round 1 must wait until all of round 0 is measured.
        """
        self._num_blocks = num_blocks
        self._rounds = rounds
        self._chunks = list(chunks)
        self._held_out = [name for name in chunks if is_held_out(name)]
        self._streams = stream_names(rounds)
        self._measured_first = measured_first
        self.units = unit_names(num_blocks, num_copies, rounds, bool(self._held_out))
        self.finished = set(finished) & set(self.units)
        self._ready = {
            (stream, block): set(present.get(name, {}).get(block, ()))
            for stream, name in enumerate(self._streams)
            for block in range(num_blocks + 1)
        }
        self._repeated: dict[tuple[int, int], set[str]] = {}
        self._reopen(set(finished if written is None else written))
        places = [(r, b) for r in range(rounds + 1) for b in range(num_blocks)]
        self._blocks = {(r, b): RoundBlock(r, b, evaluates=r == rounds) for r, b in places}
        for block in self._blocks.values():
            block.state = State.FINISHED if block.unit in self.finished else State.WAITING
        self._held: dict[int, RoundBlock] = {}
        self._split: list[RoundBlock] = []
        self._taken: set[Call] = set()

    @property
    def complete(self) -> bool:
        """Whether every unit is finished."""
        return len(self.finished) == len(self.units)

    def next_call(self, worker: int, idle: int = 0) -> Call | None:
        """Say what a free worker shall do now; see `Schedule`."""
        held = self._held.get(worker)
        if held is not None:
            call = self._continue(held, idle)
            if call is not None or self._has_later(held):
                return call
        for call in self._candidates():
            if call in self._taken or (held and not self._is_waited_for(call, held)):
                continue
            self._release(worker)
            if isinstance(call, OpenBlock):
                self._held[worker] = self._blocks[call.place]
                self._held[worker].move(State.OPENING)
            else:
                self._taken.add(call)
            return call
        return None

    def done(self, worker: int, call: Call, result: Result) -> list[Spent]:
        """Take note that a call returned; see `Schedule`."""
        self._taken.discard(call)
        match call:
            case OpenBlock():
                self._blocks[call.place].move(State.FEEDING)
                return []
            case Forward():
                self._blocks[call.place].next_chunk += 1
                self._ready[call.round_index, call.block + 1].add(call.chunk)
                return []
            case ForwardChunk():
                return self._passed(self._streams.index(call.stream), call.block, call.chunk)
            case SplitBlock():
                assert isinstance(result, BlockParts)
                self._split.append(self._held.pop(worker))
                self._split[-1].move(State.SPLIT, PendingCalls(call.place, result.batches))
                return []
            case MergeHessians() | TryBetas() | SolveRows():
                parts = self._blocks[call.place].parts
                assert parts is not None
                parts.done(call)
                return []
        self.finished.add(call.unit)
        if isinstance(call, SolveBlock | FinishEvaluation | WriteBlock):
            self._held.pop(worker, None)
            self._split = [block for block in self._split if block.place != call.place]
            self._blocks[call.place].move(State.FINISHED)
        if isinstance(call, Embed):
            for stream in range(self._rounds + 1):
                self._ready[stream, 0].update(self._chunks)
        return self._spent(call)

    def failed(self, worker: int, call: Call) -> None:
        """Take note that a call came to nothing, and that the worker has lost what it held."""
        self._taken.discard(call)
        self._release(worker)

    def holds(self, worker: int) -> bool:
        """Whether a worker has an open block."""
        return worker in self._held

    def _release(self, worker: int) -> None:
        """Let the block that a worker holds, if any, begin anew with whoever is free."""
        if worker in self._held:
            self._held.pop(worker).move(State.WAITING)

    def _continue(self, held: RoundBlock, idle: int = 0) -> Call | None:
        """The next call of a block that a worker holds; None where its next chunk is not there yet."""
        if held.state is State.OPENING:
            return held.opening
        chunks = self._held_out if held.evaluates else self._chunks
        if held.next_chunk == len(chunks):
            ending = FinishEvaluation if held.evaluates else SplitBlock if idle else SolveBlock
            return ending(*held.place)
        chunk = chunks[held.next_chunk]
        return Forward(*held.place, chunk, held.evaluates) if chunk in self._ready[held.place] else None

    def _has_later(self, held: RoundBlock) -> bool:
        """Whether a worker holds a later block of the same round."""
        return any(other.round_index == held.round_index and other.block > held.block for other in self._held.values())

    def _is_waited_for(self, call: Call, held: RoundBlock) -> bool:
        """Whether a block in a worker's hands waits, maybe through others in workers' hands, for a call to be made."""
        places = {other.place: other for other in self._held.values()}
        first = held
        while (first.round_index, first.block - 1) in places:
            first = places[first.round_index, first.block - 1]
        if isinstance(call, OpenBlock):
            # More than one block may have been lost: the first of them is what can begin.
            return call.round_index == first.round_index and call.block < first.block
        return isinstance(call, Embed | ForwardChunk) and self._continue(first) is None

    def _candidates(self) -> Iterator[Call]:
        """First calls of units whose inputs are there, the most urgent first."""
        copying = copy_calls(unit for unit in self.units if unit not in self.finished)
        if EMBED in self.finished:
            yield from self._repeats()
            losses = self._losses()
            if losses:
                yield from copying  # the head may be among what was copied
            yield from losses
            yield from self._parts()
            yield from self._next_blocks()
        else:
            yield Embed()
        yield from copying

    def _repeats(self) -> list[ForwardChunk]:
        """Chunks that pass through a finished block once more, because what it handed on is lost."""
        calls = []
        for (stream, block), chunks in sorted(self._repeated.items()):
            if stream and block_unit(stream - 1, block) not in self.finished:
                continue
            unit = self._producer(stream, block + 1)
            for chunk in sorted(chunks & self._ready[stream, block]):
                calls.append(ForwardChunk(self._streams[stream], block, chunk, unit))
        return calls

    def _parts(self) -> Iterator[Call]:
        """The open parts of the blocks that are split; of one without any left, its shard."""
        for block in self._split:
            assert block.parts is not None
            yield from block.parts.left or [WriteBlock(*block.place)]

    def _losses(self) -> list[EvaluateLoss]:
        """The streams whose held-out chunks have all come to their end."""
        ready = []
        for index, stream in enumerate(self._streams if self._held_out else []):
            there = self._ready[index, self._num_blocks].issuperset(self._held_out)
            if there and head_unit(stream) not in self.finished:
                ready.append(EvaluateLoss(stream))
        return ready

    def _next_blocks(self) -> list[OpenBlock]:
        """The next block of each pass that can begin. Blocks begin in order, so that their inputs are on the way."""
        calls = []
        # The pass through the result has the longest way to go once all is solved: never let it fall behind.
        for r in [*([self._rounds] if self._held_out else []), *range(self._rounds)]:
            blocks = (self._blocks[r, b] for b in range(self._num_blocks))
            waiting = next((block for block in blocks if block.state is State.WAITING), None)
            if waiting is not None and self._may_begin(r, waiting.block):
                calls.append(waiting.opening)
        return calls

    def _may_begin(self, r: int, block: int) -> bool:
        if self._repeated.get((r, block - 1)):
            # It would wait with a worker in hand for chunks that must be passed on first, perhaps by that worker.
            return False
        if r == 0:
            return True
        if self._measured_first and any(block_unit(0, b) not in self.finished for b in range(self._num_blocks)):
            return False
        # A worker that evaluates waits for one block at most, whose chunks are on their way while it reads its own.
        coming = r < self._rounds or any(self._ready[r, b] for b in (block - 1, block) if b >= 0)
        return coming and block_unit(r - 1, block) in self.finished

    def _passed(self, stream: int, block: int, chunk: str) -> list[Spent]:
        """A chunk was passed through a finished block once more; behind the last one, the block's inputs are spent."""
        self._ready[stream, block + 1].add(chunk)
        self._repeated[stream, block].discard(chunk)
        if self._repeated[stream, block] or self._consumer(stream, block)[0] not in self.finished:
            return []
        return [SpentInputs(block, self._streams[stream])]

    def _spent(self, call: Call) -> list[Spent]:
        """What nothing needs any more once a unit is finished."""
        match call:
            case SolveBlock(r, block) | WriteBlock(r, block):
                before = [SpentShard(r - 1, block)] if r else []
                return [SpentInputs(block, self._streams[r]), SpentParts(r, block), *before]
            case FinishEvaluation():
                return [SpentInputs(call.block, self._streams[-1])]
            case EvaluateLoss():
                return [SpentInputs(self._num_blocks, call.stream)]
        return []

    def _reopen(self, written: set[str]) -> None:
        """Make again what an unfinished unit needs and is gone.

        Inputs are made by passing chunks through the blocks before it, which are not solved again; a shard of an
        earlier round by solving that block.
        """
        for stream in reversed(range(self._rounds + 1)):
            for block in reversed(range(self._num_blocks + 1)):
                unit, inputs = self._consumer(stream, block)
                wanted = set(self._repeated.get((stream, block), ()))
                if unit in self.units and unit not in self.finished:
                    wanted |= set(inputs)
                missing = wanted - self._ready[stream, block]
                if wanted and stream and block < self._num_blocks and block_unit(stream - 1, block) not in written:
                    self.finished.discard(block_unit(stream - 1, block))
                if missing and not block:
                    self.finished.discard(EMBED)
                elif missing and self._producer(stream, block) in self.finished:
                    self._repeated[stream, block - 1] = missing

    def _consumer(self, stream: int, block: int) -> tuple[str, list[str]]:
        """The unit that reads a block's inputs of a stream, and the chunks that it reads."""
        if block == self._num_blocks:
            return head_unit(self._streams[stream]), self._held_out
        if stream == self._rounds:
            return evaluate_unit(block), self._held_out
        return block_unit(stream, block), self._chunks

    def _producer(self, stream: int, block: int) -> str:
        """The unit that makes a block's inputs of a stream."""
        if not block:
            return EMBED
        return evaluate_unit(block - 1) if stream == self._rounds else block_unit(stream, block - 1)
