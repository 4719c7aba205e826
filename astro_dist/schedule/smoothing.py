"""The schedule that comes before all others where inputs are smoothed: it measures the channels of all inputs."""

from collections.abc import Iterator

from astro_dist.schedule.calls import Call, Embed, ForwardChunk, MeasureChannels, Result, SmoothChannels
from astro_dist.schedule.names import CHANNELS, EMBED, ORIGINAL, is_held_out, smoothing_unit
from astro_dist.schedule.schedule import NOTHING_DONE, RunShape, StartingPoint
from astro_dist.schedule.spent import Spent, SpentInputs

__all__ = ["SmoothingSchedule"]


class SmoothingSchedule:
    """Holds the state of the wave that measures channels, and decides what each worker does next.

    The calibration chunks pass through the source's blocks, and each leaves behind a block how large the channels of
    its layers' inputs are. Once all chunks have passed a block, it is decided how its inputs are smoothed:

        tokens ── Embed ──▶ hidden 0 ── MeasureChannels … ──▶ hidden 1 ── MeasureChannels … ──▶ …
                                              │                                 │
                                              ▼ SmoothChannels                  ▼ SmoothChannels
                                         smoothing 0                       smoothing 1

    The inputs of all blocks are kept, because whatever comes next begins with them. A worker stays with a block as long
    as chunks are on their way to it.

    Attributes:
        units: Names of all units of the wave.
        finished: Names of the units that are finished.
    """

    def __init__(self, shape: RunShape, start: StartingPoint = NOTHING_DONE, keeps_last: bool = False) -> None:
        """Begin the wave, or go on with it.

        Args:
            shape: Size of the run.
            start: What of the run is done already.
            keeps_last: Whether the output of the last block is wanted too.
        """
        self._num_blocks, self._keeps_last = shape.num_blocks, keeps_last
        self._all_chunks = list(shape.chunks)
        self._chunks = [chunk for chunk in shape.chunks if not is_held_out(chunk)]
        self.units = [EMBED, *map(smoothing_unit, range(shape.num_blocks))]
        self.finished = set(start.finished) & set(self.units)
        self._open = {block for block in range(shape.num_blocks) if smoothing_unit(block) not in self.finished}
        self._hidden = start.chunks_before(ORIGINAL, shape.num_blocks)
        self._measured = start.chunks_behind(CHANNELS, shape.num_blocks)
        for block in self._open:  # what is decided is tried on the first chunk
            if self._chunks[0] not in self._hidden[block]:
                self._measured[block].discard(self._chunks[0])
        if any(self._lacking(chunk) is not None and chunk not in self._hidden[0] for chunk in self._chunks):
            self.finished.discard(EMBED)  # it is made again
        self._places: dict[int, int] = {}  # the block that a worker has loaded, by worker
        self._taken: set[Call] = set()

    @property
    def complete(self) -> bool:
        """Tell whether every unit is finished."""
        return not self._open

    @property
    def inputs(self) -> dict[int, set[str]]:
        """Return the chunks whose hidden states are there as input of each block, and behind the last one if kept."""
        last = self._num_blocks + self._keeps_last
        return {block: set(chunks) for block, chunks in enumerate(self._hidden[:last])}

    def next_call(self, worker: int, idle: int = 0) -> Call | None:
        """Decide what a free worker does now; see `Schedule`."""
        free: dict[int, Call] = {}
        for call in self._candidates():
            if call not in self._taken:
                free.setdefault(_place(call), call)
        here = self._places.get(worker)
        place = here if here in free else None
        if place is None and free and not self.holds(worker):
            busy = set(self._places.values())
            place = next((place for place in free if place not in busy), next(iter(free)))
        if place is None:
            return None
        self._places[worker] = place
        self._taken.add(free[place])
        return free[place]

    def done(self, worker: int, call: Call, result: Result) -> list[Spent]:
        """Take note that a call returned; see `Schedule`."""
        self._taken.discard(call)
        match call:
            case ForwardChunk():
                self._hidden[call.block + 1].add(call.chunk)
            case MeasureChannels():
                self._measured[call.block].add(call.chunk)
                if call.block + 1 < self._num_blocks or self._keeps_last:
                    self._hidden[call.block + 1].add(call.chunk)
            case Embed():
                self._hidden[0].update(self._all_chunks)
                self.finished.add(EMBED)
            case SmoothChannels():
                self.finished.add(call.unit)
                self._open.discard(call.block)
                return [SpentInputs(call.block + 1, CHANNELS)]
        return []

    def failed(self, worker: int, call: Call) -> None:
        """Take note that a call came to nothing, and that the worker has lost the block that it had loaded."""
        self._taken.discard(call)
        self._places.pop(worker, None)

    def holds(self, worker: int) -> bool:
        """Tell whether a worker waits for chunks that are on their way to the block that it has loaded."""
        here = self._places.get(worker)
        if here is None:
            return False
        held = set(self._places.values())
        moving = [*self._taken, *(call for call in self._candidates() if _place(call) in held)]
        return any(isinstance(call, ForwardChunk | MeasureChannels) and call.block < here for call in moving)

    def _candidates(self) -> Iterator[Call]:
        """The calls whose inputs are there, the most urgent first, whether they are being made or not."""
        if EMBED not in self.finished:
            yield Embed()
            return
        for block in sorted(self._open):
            if self._measured[block].issuperset(self._chunks):
                yield SmoothChannels(block)
        steps = [step for chunk in self._chunks if (step := self._next_step(chunk)) is not None]
        yield from sorted(steps, key=lambda step: step.block)

    def _next_step(self, chunk: str) -> ForwardChunk | MeasureChannels | None:
        """The next call on the way of a chunk; None where nothing is left."""
        goal = self._lacking(chunk)
        if goal is None:
            return None
        at = next((block for block in range(goal, -1, -1) if chunk in self._hidden[block]), None)
        assert at is not None, "a chunk that is nowhere on its way is embedded anew"
        return MeasureChannels(goal, chunk) if at == goal else ForwardChunk(ORIGINAL, at, chunk, smoothing_unit(at))

    def _lacking(self, chunk: str) -> int | None:
        """The first block that is not decided and that a chunk has not passed."""
        return min((block for block in self._open if chunk not in self._measured[block]), default=None)


def _place(call: Call) -> int:
    return getattr(call, "block", -1)
