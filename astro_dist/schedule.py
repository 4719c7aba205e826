"""Who does what next. Pure: it is told what was finished and answers what a free worker shall do.

A block is opened by one worker, fed with its input chunks as the block before it produces them, and solved there while
other workers already feed the next blocks. Behind the solved blocks, the held-out chunks travel a second time, through
the quantized blocks as they were written: that is the perplexity of the result.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

__all__ = ["Call", "Schedule", "is_held_out", "unit_names"]


@dataclasses.dataclass(frozen=True)
class Call:
    """One method call on a worker.

    Attributes:
        method: of the worker.
        args: its arguments.
        unit: name of the unit it belongs to.
    """

    method: str
    args: tuple[int | str, ...]
    unit: str


def is_held_out(chunk: str) -> bool:
    """Whether a chunk is only measured on, never calibrated on: its name begins with `h`."""
    return chunk.startswith("h")


def unit_names(num_blocks: int, num_copies: int, evaluated: bool) -> list[str]:
    """Every unit of a run."""
    blocks = [f"block-{i:04d}" for i in range(num_blocks)]
    chain = [f"quantized-{i:04d}" for i in range(num_blocks)] + ["head-original", "head-quantized"]
    return ["embed", *(f"copy-{i:04d}" for i in range(num_copies)), *blocks, *(chain if evaluated else [])]


@dataclasses.dataclass
class _Task:
    """A block in the hands of a worker."""

    block: int
    next_chunk: int = 0
    opened: bool = False


class Schedule:
    """State of a run in mode `blocks`."""

    def __init__(
        self,
        num_blocks: int,
        num_copies: int,
        chunks: Sequence[str],
        finished: Collection[str],
        present: Mapping[int, Collection[str]],
        present_quantized: Mapping[int, Collection[str]],
    ) -> None:
        """Begin, or go on.

        Args:
            num_blocks: of the model.
            num_copies: units of copied tensors.
            chunks: names in the order in which they travel; see `is_held_out`.
            finished: names of the units that are finished.
            present: chunks that are there as input of each block.
            present_quantized: held-out chunks that are there as input of each quantized block.
        """
        self._num_blocks = num_blocks
        self._chunks = list(chunks)
        self._held_out = [name for name in chunks if is_held_out(name)]
        self._units = unit_names(num_blocks, num_copies, bool(self._held_out))
        self.finished = set(finished) & set(self._units)
        self._ready = {block: set(present.get(block, ())) for block in range(num_blocks + 1)}
        self._reopen(present_quantized)
        self._active: dict[int, _Task] = {}
        self._taken: set[str] = set()

    @property
    def complete(self) -> bool:
        """Whether every unit is finished."""
        return len(self.finished) == len(self._units)

    @property
    def total(self) -> int:
        """Number of units."""
        return len(self._units)

    def next_call(self, worker: int) -> Call | None:
        """What a free worker shall do now; None where it must wait for another."""
        task = self._active.get(worker)
        if task is not None:
            return self._continue(task)
        for unit in self._candidates():
            if unit not in self.finished and unit not in self._taken:
                self._taken.add(unit)
                return self._begin(worker, unit)
        return None

    def done(self, worker: int, call: Call) -> None:
        """Take note that a call returned."""
        task = self._active.get(worker)
        if call.method == "open_block" and task:
            task.opened = True
        elif call.method == "forward" and task:
            task.next_chunk += 1
            self._ready[task.block + 1].add(str(call.args[1]))
        else:
            self.finished.add(call.unit)
            self._active.pop(worker, None)
        if call.unit == "embed":
            self._ready[0].update(self._chunks)

    def _continue(self, task: _Task) -> Call | None:
        unit = f"block-{task.block:04d}"
        if not task.opened:
            return Call("open_block", (task.block,), unit)
        if task.next_chunk == len(self._chunks):
            return Call("solve", (task.block,), unit)
        chunk = self._chunks[task.next_chunk]
        return Call("forward", (task.block, chunk), unit) if chunk in self._ready[task.block] else None

    def _begin(self, worker: int, unit: str) -> Call:
        kind, _, rest = unit.partition("-")
        if kind == "block":
            self._active[worker] = _Task(int(rest))
            return Call("open_block", (int(rest),), unit)
        if kind == "head":
            return Call("head", (rest,), unit)
        method = {"embed": "embed", "copy": "copy", "quantized": "advance"}[kind]
        return Call(method, (int(rest),) if rest else (), unit)

    def _candidates(self) -> list[str]:
        """Units whose inputs are there, the most urgent first."""
        copies = [unit for unit in self._units if unit.startswith("copy-")]
        if "embed" not in self.finished:
            return ["embed", *copies]
        # The chain through the quantized blocks is serial: never let it fall behind.
        return [*self._chain(), *self._next_block(), *copies]

    def _chain(self) -> list[str]:
        if not self._held_out:
            return []
        ready = []
        behind = next((b for b in range(self._num_blocks) if f"quantized-{b:04d}" not in self.finished), None)
        if behind is None:
            ready.append("head-quantized")
        elif f"block-{behind:04d}" in self.finished:
            ready.append(f"quantized-{behind:04d}")
        if self._ready[self._num_blocks].issuperset(self._held_out):
            ready.append("head-original")
        return ready

    def _next_block(self) -> list[str]:
        blocks = (f"block-{b:04d}" for b in range(self._num_blocks))
        return [unit for unit in blocks if unit not in self.finished and unit not in self._taken][:1]

    def _reopen(self, present_quantized: Mapping[int, Collection[str]]) -> None:
        """A finished unit whose outputs are gone is done again where an unfinished one needs them."""
        last = self._num_blocks
        for block in reversed(range(last + 1)):
            chain = f"quantized-{block:04d}" if block < last else "head-quantized"
            if self._lacks(chain, self._held_out, present_quantized.get(block, ())):
                self.finished.discard(f"quantized-{block - 1:04d}" if block else "embed")
        for block in reversed(range(last + 1)):
            unit, needed = (f"block-{block:04d}", self._chunks) if block < last else ("head-original", self._held_out)
            if self._lacks(unit, needed, self._ready[block]):
                self.finished.discard(f"block-{block - 1:04d}" if block else "embed")

    def _lacks(self, unit: str, needed: Collection[str], present: Collection[str]) -> bool:
        return unit in self._units and unit not in self.finished and not set(present).issuperset(needed)
