"""Mode `blocks`: every block on its own, in one or more rounds. Pure, as every schedule."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from astro_dist.schedule.calls import Call, Present, Spent, copy_calls
from astro_dist.schedule.names import block_unit, evaluate_unit, head_unit, is_held_out, stream_names, unit_names
from astro_dist.schedule.pending_calls import OpenCalls

__all__ = ["BlockSchedule"]


@dataclasses.dataclass
class _Task:
    """A block in the hands of a worker; in the pass behind the last round to be evaluated, else to be quantized."""

    round_index: int
    block: int
    next_chunk: int = 0
    opened: bool = False
    evaluated: bool = False

    @property
    def unit(self) -> str:
        """Its name."""
        return evaluate_unit(self.block) if self.evaluated else block_unit(*self.place)

    @property
    def place(self) -> tuple[int, int]:
        """Where in the run it is; a block before another one comes first."""
        return self.round_index, self.block

    @property
    def opening(self) -> Call:
        """The call that it begins with."""
        return Call("open_block", self.place, self.unit)


class BlockSchedule:
    """State of a run in mode `blocks`.

    A block is opened by one worker, fed with its input chunks as the block before it produces them, and solved there
    while other workers already feed the next blocks. A block of a later round waits for nothing but its inputs and its
    own result of the round before, so rounds follow each other without a gap.

    Where other workers have nothing to do when a block is to be solved, it is given out: they solve its
    groups of layers that share an input, tile by tile of their rows. It comes to the same bytes.

    Behind the last round the held-out chunks make one more pass, through the blocks of the result. It goes from block
    to block as all others do, so that no chunk waits for the chunks after it.

    A block whose worker was lost begins anew with the next worker that is free. Where none is, because all of them wait
    for what it hands on, the worker at the furthest block gives its own up for it.
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
        """Begin, or go on.

        Args:
            num_blocks: of the model.
            num_copies: units of copied tensors.
            chunks: names in the order in which they travel; see `is_held_out`.
            finished: names of the units that are finished.
            present: chunks that are there as input of each block.
            rounds: passes over the model.
            written: the finished units whose files are still there; all of them where not given.
            measured_first: whether round 1 must wait until all of round 0 is measured.
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
        self._active: dict[int, _Task] = {}
        self._given_out: dict[tuple[int, int], OpenCalls] = {}
        self._taken: set[Call] = set()

    @property
    def complete(self) -> bool:
        """Whether every unit is finished."""
        return len(self.finished) == len(self.units)

    def next_call(self, worker: int, idle: int = 0) -> Call | None:
        """What a free worker shall do now; None where it must wait for another. `idle` others have nothing to do."""
        task = self._active.get(worker)
        if task is not None:
            call = self._continue(task, idle)
            if call is not None or self._has_later(task):
                return call
        for call in self._candidates():
            if call in self._taken or (task and not self._is_waited_for(call, task)):
                continue
            if task:
                self.failed(worker, task.opening)
            if call.method == "open_block":
                self._active[worker] = self._task(*_place(call))
            self._taken.add(call)
            return call
        return None

    def done(self, worker: int, call: Call, result: Any) -> list[Spent]:
        """Take note that a call returned; what is not needed any more."""
        task = self._active.get(worker)
        if call.method == "open_block" and task:
            task.opened = True
            return []
        if call.method == "forward" and task:
            task.next_chunk += 1
            self._ready[task.round_index, task.block + 1].add(str(call.args[2]))
            return []
        self._taken.discard(call)
        if call.method == "give_out":
            # Its opening stays taken: nobody shall begin it anew.
            del self._active[worker]
            self._given_out[_place(call)] = OpenCalls(call.args, call.unit, dict(result["groups"]))
            return []
        if call.method in ("decide", "weigh", "tile"):
            self._given_out[_place(call)].done(call)
            return []
        if call.method == "pass_on":
            return self._passed(self._streams.index(str(call.args[0])), int(call.args[1]), str(call.args[2]))
        self.finished.add(call.unit)
        if task:
            self._taken.discard(self._active.pop(worker).opening)
        if call.method == "write":
            del self._given_out[_place(call)]
            self._taken.discard(self._task(*_place(call)).opening)
        if call.method == "embed":
            for stream in range(self._rounds + 1):
                self._ready[stream, 0].update(self._chunks)
        return self._spent(call)

    def failed(self, worker: int, call: Call) -> None:
        """Take note that a call came to nothing, and that the worker has lost what it held."""
        self._taken.discard(call)
        if worker in self._active:
            self._taken.discard(self._active.pop(worker).opening)

    def holds(self, worker: int) -> bool:
        """Whether a worker has an open block."""
        return worker in self._active

    def _continue(self, task: _Task, idle: int = 0) -> Call | None:
        if not task.opened:
            return task.opening
        chunks = self._held_out if task.evaluated else self._chunks
        if task.next_chunk == len(chunks):
            method = "conclude" if task.evaluated else "give_out" if idle else "solve"
            return Call(method, task.place, task.unit)
        chunk = chunks[task.next_chunk]
        return Call("forward", (*task.place, chunk), task.unit) if chunk in self._ready[task.place] else None

    def _has_later(self, task: _Task) -> bool:
        """Whether a worker holds a later block of the same round."""
        return any(
            other.round_index == task.round_index and other.block > task.block for other in self._active.values()
        )

    def _is_waited_for(self, call: Call, task: _Task) -> bool:
        """Whether a block in a worker's hands waits, maybe through others in workers' hands, for a call to be made."""
        held = {other.place: other for other in self._active.values()}
        first = task
        while (first.round_index, first.block - 1) in held:
            first = held[first.round_index, first.block - 1]
        if call.method == "open_block":
            # More than one block may have been lost: the first of them is what can begin.
            return call.args[0] == first.round_index and int(call.args[1]) < first.block
        return call.method in ("embed", "pass_on") and self._continue(first) is None

    def _candidates(self) -> Iterator[Call]:
        """First calls of units whose inputs are there, the most urgent first."""
        copying = copy_calls(unit for unit in self.units if unit not in self.finished)
        if "embed" in self.finished:
            yield from self._repeats()
            heads = self._heads()
            if heads:
                yield from copying  # a head reads what was copied
            yield from heads
            yield from self._parts()
            yield from self._next_blocks()
        else:
            yield Call("embed", (), "embed")
        yield from copying

    def _repeats(self) -> list[Call]:
        """Chunks that pass through a finished block once more, because what it handed on is lost."""
        calls = []
        for (stream, block), chunks in sorted(self._repeated.items()):
            if stream and block_unit(stream - 1, block) not in self.finished:
                continue
            unit = self._producer(stream, block + 1)
            for chunk in sorted(chunks & self._ready[stream, block]):
                calls.append(Call("pass_on", (self._streams[stream], block, chunk), unit))
        return calls

    def _parts(self) -> Iterator[Call]:
        for (r, block), given in self._given_out.items():
            yield from given.left or [Call("write", (r, block), block_unit(r, block))]

    def _heads(self) -> list[Call]:
        ready = []
        for index, stream in enumerate(self._streams if self._held_out else []):
            there = self._ready[index, self._num_blocks].issuperset(self._held_out)
            if there and head_unit(stream) not in self.finished:
                ready.append(Call("head", (stream,), head_unit(stream)))
        return ready

    def _next_blocks(self) -> list[Call]:
        """The next block of each pass that can begin. Blocks begin in order, so that their inputs are on the way."""
        found = []
        # The pass through the result has the longest way to go once all is solved: never let it fall behind.
        for r in [*([self._rounds] if self._held_out else []), *range(self._rounds)]:
            calls = (self._task(r, b).opening for b in range(self._num_blocks))
            pending = next((c for c in calls if c.unit not in self.finished and c not in self._taken), None)
            if pending is not None and self._may_begin(r, int(pending.args[1])):
                found.append(pending)
        return found

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

    def _task(self, round_index: int, block: int) -> _Task:
        return _Task(round_index, block, evaluated=round_index == self._rounds)

    def _passed(self, stream: int, block: int, chunk: str) -> list[Spent]:
        """A chunk was passed through a finished block once more; behind the last one, the block's inputs are spent."""
        self._ready[stream, block + 1].add(chunk)
        self._repeated[stream, block].discard(chunk)
        if self._repeated[stream, block] or self._consumer(stream, block)[0] not in self.finished:
            return []
        return [Spent("inputs", block, self._streams[stream])]

    def _spent(self, call: Call) -> list[Spent]:
        """What nothing needs any more once a unit is finished."""
        if call.method in ("solve", "write"):
            r, block = _place(call)
            before = [Spent("shard", block, number=r - 1)] if r else []
            return [Spent("inputs", block, self._streams[r]), Spent("parts", block, number=r), *before]
        if call.method == "conclude":
            return [Spent("inputs", _place(call)[1], self._streams[-1])]
        return [Spent("inputs", self._num_blocks, str(call.args[0]))] if call.method == "head" else []

    def _reopen(self, written: set[str]) -> None:
        """What an unfinished unit needs and is gone is made again: inputs by passing chunks through the blocks before
        it, which are not solved again; a shard of an earlier round by solving that.
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
                    self.finished.discard("embed")
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
        if not block:
            return "embed"
        return evaluate_unit(block - 1) if stream == self._rounds else block_unit(stream, block - 1)


def _place(call: Call) -> tuple[int, int]:
    """Round and block of a call."""
    return int(call.args[0]), int(call.args[1])
