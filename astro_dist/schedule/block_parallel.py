"""The schedule of the modes `blocks` and `stages`: every block is quantized on its own, in one or more rounds."""

import dataclasses
from collections.abc import Iterator

from astro_dist.schedule.block_state import RoundBlock, State
from astro_dist.schedule.calls import (
    BatchCall,
    BlockParts,
    Call,
    Embed,
    EvaluateLoss,
    FinishEvaluation,
    Forward,
    ForwardChunk,
    OpenBlock,
    Result,
    SolveBlock,
    SplitBlock,
    WriteBlock,
    copy_calls,
)
from astro_dist.schedule.foretold_blocks import ForetoldBlocks
from astro_dist.schedule.names import (
    EMBED,
    ORIGINAL,
    block_unit,
    evaluate_unit,
    head_unit,
    is_held_out,
    stream_names,
    unit_names,
)
from astro_dist.schedule.pending_calls import PendingCalls
from astro_dist.schedule.schedule import NOTHING_DONE, RunShape, StartingPoint
from astro_dist.schedule.spent import Spent, SpentInputs, SpentParts, SpentShard

__all__ = ["BlockSchedule"]


class BlockSchedule:
    """Holds the state of a run in mode `blocks` or `stages`, and decides what each worker does next.

    One worker opens a block, feeds it with its input chunks as the block before it produces them, and solves it, while
    other workers already feed the next blocks. A block of a later round waits only for its inputs and for its result of
    the round before, so rounds follow each other without a gap.

    Where other workers have nothing to do when a block is to be solved, it is split: they solve its input groups, tile
    by tile of their rows. The bytes of the result are the same. In mode `stages` no block is split, because its input
    groups wait for each other, and chunks whose outputs are there already do not pass it again.

    After the last round the held-out chunks make one more pass, through the blocks of the result. They too go from
    block to block one by one, so that no chunk waits for the chunks after it.

    The diagram shows the states of a block in a round, and the calls that lead from one to the next when they return:

                 is given out       OpenBlock        SolveBlock, or FinishEvaluation after the last round
        WAITING ──────────────▶ OPENING ─────▶ FEEDING ──────────────────────────────────────────▶ FINISHED
           ▲                       │            │    │ SplitBlock                                     ▲
           │    worker lost, or    │            │    ▼               WriteBlock                       │
           └──── gives it up ──────┴────────────┘  SPLIT ─────────────────────────────────────────────┘
                                                     ↺ MergeHessians, TryBetas, SolveRows, Reconstruct

    A block in state OPENING or FEEDING is held by a worker, in any other state by none. So a lost worker costs a split
    block no more than the part that the worker was at. A block whose worker was lost begins anew with the next worker
    that is free. Where none is free, because all of them wait for the output of that block, the worker at the furthest
    block gives up its own block and begins the lost one.

    Attributes:
        units: Names of all units of the run.
        finished: Names of the units that are finished.
    """

    def __init__(
        self,
        shape: RunShape,
        start: StartingPoint = NOTHING_DONE,
        rounds: int = 1,
        measured_first: bool = False,
        in_stages: bool = False,
    ) -> None:
        """Begin a run, or go on with it.

        Args:
            shape: Size of the run.
            start: What of the run is done already.
            rounds: Number of passes over the model that quantize its blocks.
            measured_first: Whether round 1 waits until round 0 has quantized every block.
            in_stages: Whether the layers of a block wait for each other. Then blocks are not split, and chunks pass a
                block only for their outputs: statistics are summed stage by stage by who solves it.
        """
        self._num_blocks = shape.num_blocks
        self._rounds = rounds
        self._chunks = list(shape.chunks)
        self._held_out = [name for name in shape.chunks if is_held_out(name)]
        self._streams = stream_names(rounds)
        self._measured_first, self._in_stages = measured_first, in_stages
        self.units = unit_names(shape.num_blocks, shape.num_copies, rounds, bool(self._held_out))
        self.finished = set(start.finished) & set(self.units)
        self._ready = {
            (stream, block): set(start.present.get(name, {}).get(block, ()))
            for stream, name in enumerate(self._streams)
            for block in range(shape.num_blocks + 1)
        }
        self._repeated: dict[tuple[int, int], set[str]] = {}
        self._reopen(set(start.finished if start.written is None else start.written))
        places = [(r, b) for r in range(rounds + 1) for b in range(shape.num_blocks)]
        self._blocks = {(r, b): RoundBlock(r, b, evaluates=r == rounds) for r, b in places}
        for block in self._blocks.values():
            block.state = State.FINISHED if block.unit in self.finished else State.WAITING
        self._open_blocks: dict[int, RoundBlock] = {}  # by worker
        self._split: list[RoundBlock] = []
        self._taken: set[Call] = set()
        self._foretold = ForetoldBlocks()

    @property
    def complete(self) -> bool:
        """Tell whether every unit is finished."""
        return len(self.finished) == len(self.units)

    def next_call(self, worker: int, idle: int = 0) -> Call | None:
        """Decide what a free worker does now; see `Schedule`."""
        block = self._open_blocks.get(worker)
        if block is not None:
            call = self._continue(block, idle)
            if isinstance(call, SolveBlock):
                return dataclasses.replace(call, following=self._foretold.foretell(worker, self._waiting()))
            if call is not None or self._has_later(block):
                return call
        for call in self._candidates():
            if call in self._taken or (block and not self._is_waited_for(call, block)):
                continue
            self._release(worker)
            foretold = self._foretold.take(worker)
            if isinstance(call, OpenBlock):
                self._open_blocks[worker] = self._blocks[call.place]
                self._open_blocks[worker].move(State.OPENING)
                return dataclasses.replace(call, was_foretold=call.place == (0, foretold))
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
                self._split.append(self._open_blocks.pop(worker))
                self._split[-1].move(State.SPLIT, PendingCalls(call.place, result.batches))
                return []
            case BatchCall():
                parts = self._blocks[call.place].parts
                assert parts is not None
                parts.done(call)
                return []
        self.finished.add(call.unit)
        if isinstance(call, SolveBlock | FinishEvaluation | WriteBlock):
            self._open_blocks.pop(worker, None)
            self._split = [block for block in self._split if block.place != call.place]
            self._blocks[call.place].move(State.FINISHED)
        if isinstance(call, Embed):
            for stream in range(self._rounds + 1):
                self._ready[stream, 0].update(self._chunks)
        return self._spent(call)

    def failed(self, worker: int, call: Call) -> None:
        """Take note that a call came to nothing, and that the worker has lost its block; see `Schedule`."""
        self._taken.discard(call)
        self._release(worker)
        self._foretold.take(worker)

    def holds(self, worker: int) -> bool:
        """Tell whether a worker has a block open; see `Schedule`."""
        return worker in self._open_blocks

    def _release(self, worker: int) -> None:
        """Let the block that a worker holds, if any, begin anew with whoever is free."""
        if worker in self._open_blocks:
            self._open_blocks.pop(worker).move(State.WAITING)

    def _continue(self, block: RoundBlock, idle: int = 0) -> Call | None:
        """The next call of an open block; None where its next chunk is not there yet."""
        if block.state is State.OPENING:
            return block.opening
        chunks = self._held_out if block.evaluates else self._chunks
        while block.next_chunk < len(chunks) and self._is_skipped(block, chunks[block.next_chunk]):
            block.next_chunk += 1
        if block.next_chunk == len(chunks):
            ending = FinishEvaluation if block.evaluates else SplitBlock if idle and not self._in_stages else SolveBlock
            return ending(*block.place)
        chunk = chunks[block.next_chunk]
        return Forward(*block.place, chunk, block.evaluates) if chunk in self._ready[block.place] else None

    def _is_skipped(self, block: RoundBlock, chunk: str) -> bool:
        """Whether the input of a chunk is there and its output is not wanted, or there as well."""
        if not self._in_stages or block.evaluates or chunk not in self._ready[block.place]:
            return False
        is_wanted = block.block + 1 < self._num_blocks or is_held_out(chunk)
        return not is_wanted or chunk in self._ready[block.round_index, block.block + 1]

    def _waiting(self) -> list[int]:
        """The blocks of the first round that wait for a worker."""
        return [block for block in range(self._num_blocks) if self._blocks[0, block].state is State.WAITING]

    def _has_later(self, block: RoundBlock) -> bool:
        """Whether a later block of the same round is open."""
        others = self._open_blocks.values()
        return any(other.round_index == block.round_index and other.block > block.block for other in others)

    def _is_waited_for(self, call: Call, block: RoundBlock) -> bool:
        """Whether an open block waits for a call, be it directly or through other open blocks."""
        places = {other.place: other for other in self._open_blocks.values()}
        first = block
        while (first.round_index, first.block - 1) in places:
            first = places[first.round_index, first.block - 1]
        if isinstance(call, OpenBlock):
            # More than one block may have been lost: the first of them is what can begin.
            return call.round_index == first.round_index and call.block < first.block
        return isinstance(call, Embed | ForwardChunk) and self._continue(first) is None

    def _candidates(self) -> Iterator[Call]:
        """The calls that can begin, because their inputs are there, the most urgent first."""
        copying = copy_calls(unit for unit in self.units if unit not in self.finished)
        if EMBED in self.finished:
            yield from self._repeats()
            losses = self._losses()
            if losses:
                yield from copying  # the tensors of the head may be among those that are copied
            yield from losses
            yield from self._parts()
            yield from self._next_blocks()
        else:
            yield Embed()
        yield from copying

    def _repeats(self) -> list[ForwardChunk]:
        """The calls that pass chunks through a finished block once more, because its output is lost."""
        calls = []
        for (stream, block), chunks in sorted(self._repeated.items()):
            if stream and block_unit(stream - 1, block) not in self.finished:
                continue
            unit = self._producer(stream, block + 1)
            for chunk in sorted(chunks & self._ready[stream, block]):
                calls.append(ForwardChunk(self._streams[stream], block, chunk, unit))
        return calls

    def _parts(self) -> Iterator[Call]:
        """The parts that are left of each block that is split, or the call that writes the block where none is left."""
        for block in self._split:
            assert block.parts is not None
            yield from block.parts.left or [WriteBlock(*block.place)]

    def _losses(self) -> list[EvaluateLoss]:
        """A call for each stream whose held-out chunks have all passed the last block, as those of the source have."""
        ended = [self._ready[index, self._num_blocks].issuperset(self._held_out) for index in range(self._rounds + 1)]
        if not self._held_out or not ended[0]:
            return []
        streams = [stream for stream, has_ended in zip(self._streams, ended, strict=True) if has_ended]
        return [EvaluateLoss(stream) for stream in streams if head_unit(stream) not in self.finished]

    def _next_blocks(self) -> list[OpenBlock]:
        """The next block of each round that can begin. Blocks begin in order, so that their inputs are on the way."""
        calls = []
        # Once all blocks are solved, the pass through the result has the longest way to go: it must not fall behind.
        for r in [*([self._rounds] if self._held_out else []), *range(self._rounds)]:
            blocks = (self._blocks[r, b] for b in range(self._num_blocks))
            waiting = next((block for block in blocks if block.state is State.WAITING), None)
            if waiting is not None and self._may_begin(r, waiting.block):
                calls.append(waiting.opening)
        return calls

    def _may_begin(self, r: int, block: int) -> bool:
        if self._repeated.get((r, block - 1)):
            # It would hold a worker while it waits for chunks that must be passed on first, perhaps by that worker.
            return False
        if r == 0:
            return True
        if self._measured_first and any(block_unit(0, b) not in self.finished for b in range(self._num_blocks)):
            return False
        # A worker that evaluates waits for one block at most: its chunks are on their way while the worker reads.
        coming = r < self._rounds or any(self._ready[r, b] for b in (block - 1, block) if b >= 0)
        return coming and block_unit(r - 1, block) in self.finished

    def _passed(self, stream: int, block: int, chunk: str) -> list[Spent]:
        """Take note of a chunk that passed a finished block once more; the last of them spends the block's inputs."""
        self._ready[stream, block + 1].add(chunk)
        self._repeated[stream, block].discard(chunk)
        if self._repeated[stream, block] or not self.finished.issuperset(self._consumers(stream, block)[0]):
            return []
        return [SpentInputs(block, self._streams[stream])]

    def _spent(self, call: Call) -> list[Spent]:
        """The files that nothing needs any more once a unit is finished."""
        match call:
            case SolveBlock(r, block) | WriteBlock(r, block):
                before = [SpentShard(r - 1, block)] if r else []
                return [SpentInputs(block, self._streams[r]), SpentParts(r, block), *before]
            case FinishEvaluation():
                return [SpentInputs(call.block, self._streams[-1])]
            case EvaluateLoss():
                # Every result is compared with the source.
                compared = all(head_unit(stream) in self.finished for stream in self._streams)
                streams = [ORIGINAL] * compared + [call.stream] * (call.stream != ORIGINAL)
                return [SpentInputs(self._num_blocks, stream) for stream in streams]
        return []

    def _reopen(self, written: set[str]) -> None:
        """Let everything be made again that an unfinished unit needs and that is gone.

        Lost inputs are made by passing chunks through the blocks before, which are not solved again. A lost shard of
        an earlier round is made by solving its block again.

        Args:
            written: Names of the finished units whose files are still there.
        """
        for stream in reversed(range(self._rounds + 1)):
            for block in reversed(range(self._num_blocks + 1)):
                units, inputs = self._consumers(stream, block)
                wanted = set(self._repeated.get((stream, block), ()))
                if any(unit in self.units and unit not in self.finished for unit in units):
                    wanted |= set(inputs)
                missing = wanted - self._ready[stream, block]
                if wanted and stream and block < self._num_blocks and block_unit(stream - 1, block) not in written:
                    self.finished.discard(block_unit(stream - 1, block))
                if missing and not block:
                    self.finished.discard(EMBED)
                elif missing and self._producer(stream, block) in self.finished:
                    self._repeated[stream, block - 1] = missing

    def _consumers(self, stream: int, block: int) -> tuple[list[str], list[str]]:
        """The units that read a block's inputs of a stream, and the chunks that they read."""
        if block == self._num_blocks:
            # At the end of the source's stream every result is compared with it.
            return list(map(head_unit, [self._streams[stream]] if stream else self._streams)), self._held_out
        if stream == self._rounds:
            return [evaluate_unit(block)], self._held_out
        return [block_unit(stream, block)], self._chunks

    def _producer(self, stream: int, block: int) -> str:
        """The unit that makes a block's inputs of a stream."""
        if not block:
            return EMBED
        return evaluate_unit(block - 1) if stream == self._rounds else block_unit(stream, block - 1)
