"""The schedule that comes before a run whose calibration tokens are weighted by the loss: it measures the weights."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import get_args

from astro_dist.schedule.calls import (
    Backward,
    Call,
    DifferentiateLoss,
    Embed,
    ForwardChunk,
    LoadWeights,
    Result,
    WeighTokens,
)
from astro_dist.schedule.foretold_blocks import ForetoldBlocks
from astro_dist.schedule.names import EMBED, ENERGY, GRADIENT, LOSS_GRADIENT, ORIGINAL, is_held_out, weights_unit
from astro_dist.schedule.schedule import NOTHING_DONE, RunShape, StartingPoint
from astro_dist.schedule.spent import Spent, SpentInputs
from astro_dist.schedule.wave_call import tells_following

__all__ = ["TokenWeightSchedule"]

Place = tuple[type[Call], int]
"""What a worker has loaded, and in which direction chunks pass: the class of the calls and the index of the block."""
_Passing = ForwardChunk | DifferentiateLoss | Backward
"""The calls with which a chunk, or its gradient, passes a place."""
_HEAD: Place = (DifferentiateLoss, -1)
"""Norm and head."""
_WORTH_LOADING = 8
"""Chunks that wait at a place for each worker that stays there, where one more loads the same weights: fewer would have
passed by then."""


class TokenWeightSchedule:
    """Holds the state of the waves that measure token weights, and decides what each worker does next.

    The calibration chunks pass through the source's blocks; then the gradient of the loss passes back. The inputs of
    all blocks are kept, because each block is run once more on the way back:

                    Embed       ForwardChunk …              DifferentiateLoss …
        tokens ──────────▶ hidden 0 ───▶ … ───▶ hidden N ─────────────────────▶ gradient N
                              │                                                    │
                              ▼              Backward …                            ▼
                           energy 0 ◀─── gradient 1 ◀─── … energy N−1 ◀────────────┘
                              │                               │
                              ▼ WeighTokens                   ▼ WeighTokens
                           weights 0             …         weights N−1

    For each chunk it asks what the last unfinished block lacks, and goes back to what is there; so a lost file is made
    again, and nothing else. A worker stays with a block as long as chunks are on their way to it. It moves on where
    none are, so that the waves pass through as many blocks at a time as there are workers. A worker that has nothing to
    do loads the next block that chunks will come to, or one where many chunks wait. Norm and head are a place like any
    block: a chunk's gradient begins its way back as soon as the chunk has come to the head.

    Attributes:
        units: Names of all units of the waves.
        finished: Names of the units that are finished.
    """

    def __init__(self, shape: RunShape, start: StartingPoint = NOTHING_DONE, blocks: Iterable[int] | None = None):
        """Begin the waves, or go on with them.

        Args:
            shape: Size of the run.
            start: What of the run is done already.
            blocks: Indices of the blocks whose weights are wanted; None for all blocks.
        """
        self._num_blocks = shape.num_blocks
        wanted = set(range(shape.num_blocks) if blocks is None else blocks)
        self._all_chunks = list(shape.chunks)
        self._chunks = [chunk for chunk in shape.chunks if not is_held_out(chunk)]
        self.units = [EMBED, *map(weights_unit, range(shape.num_blocks))]
        done_with = set(range(shape.num_blocks)) - wanted
        self.finished = (set(start.finished) & set(self.units)) | set(map(weights_unit, done_with))
        self._open = {block for block in wanted if weights_unit(block) not in self.finished}
        self._hidden, self._gradient = (start.chunks_before(each, shape.num_blocks) for each in (ORIGINAL, GRADIENT))
        self._energy = start.chunks_behind(ENERGY, shape.num_blocks)
        self._places: dict[int, Place] = {}  # by worker
        self._foretold = ForetoldBlocks()
        self._taken: set[Call] = set()
        self._steps: dict[str, _Passing | None] = {}  # by chunk
        self._turns: dict[str, int] = {}  # by chunk: the block that its gradient is behind; one more for none yet
        self._open_calls: _OpenCalls | None = None
        if any(self._is_lost(chunk) for chunk in self._chunks):
            self.finished.discard(EMBED)  # it is made again

    @property
    def complete(self) -> bool:
        """Tell whether every unit is finished."""
        return not self._open

    @property
    def inputs(self) -> dict[int, set[str]]:
        """Return the chunks whose hidden states are there as input of each block."""
        return {block: set(chunks) for block, chunks in enumerate(self._hidden[: self._num_blocks])}

    def next_call(self, worker: int, idle: int = 0) -> Call | None:
        """Decide what a free worker does now; see `Schedule`."""
        calls, here = self._calls(), self._places.get(worker)
        place = here if here in calls.free else None
        if place is None and not self.holds(worker):
            place = self._next_place(calls)
        if place is None:
            return None
        self._open_calls = None
        kind, block = place
        if place != here and kind in get_args(_Passing):
            beside = list(self._places.values()).count(place)
            self._places[worker] = place
            was_foretold = self._foretold.take(worker) == block
            if kind is DifferentiateLoss:
                return LoadWeights(None, LOSS_GRADIENT, beside=beside)
            return LoadWeights(block, weights_unit(block), kind is Backward, beside, was_foretold)
        call = calls.free[place]
        self._taken.add(call)
        return self._telling(worker, place, call, idle) if isinstance(call, _Passing) else call

    def done(self, worker: int, call: Call, result: Result) -> list[Spent]:
        """Take note that a call returned; see `Schedule`."""
        self._taken.discard(call)
        self._open_calls = None
        if isinstance(call, LoadWeights):
            return []
        if isinstance(call, _Passing):
            self._steps.pop(call.chunk, None)
        else:
            self._steps.clear()
        match call:
            case ForwardChunk():
                self._hidden[call.block + 1].add(call.chunk)
            case Backward():
                self._energy[call.block].add(call.chunk)
                self._gradient[call.block].add(call.chunk)
            case Embed():
                self._hidden[0].update(self._all_chunks)
                self.finished.add(EMBED)
            case DifferentiateLoss():
                self._gradient[self._num_blocks].add(call.chunk)
            case WeighTokens():
                self.finished.add(call.unit)
                self._open.discard(call.block)
                self._gradient[call.block + 1].clear()
                return [SpentInputs(call.block + 1, stream) for stream in (GRADIENT, ENERGY)]
        return []

    def failed(self, worker: int, call: Call) -> None:
        """Take note that a call came to nothing, and that the worker has lost the block that it had loaded."""
        self._taken.discard(call)
        self._places.pop(worker, None)
        self._foretold.take(worker)
        self._open_calls = None

    def holds(self, worker: int) -> bool:
        """Tell whether chunks are at the block that a worker has loaded, or on their way to it."""
        here, calls = self._places.get(worker), self._calls()
        return here is not None and (here in calls.free or calls.feeds(here))

    def _next_place(self, calls: "_OpenCalls") -> Place | None:
        """The place where a worker is wanted that stays nowhere: where chunks wait, or will come."""
        held = Counter(self._places.values())
        nobodys = (place for place in calls.free if place not in held)
        coming = filter(calls.feeds, self._waiting())
        shared = (place for place in calls.free if calls.waiting[place] >= _WORTH_LOADING * held[place])
        return next(itertools.chain(nobodys, coming, shared), None)

    def _telling(self, worker: int, place: Place, call: _Passing, idle: int) -> Call:
        """A call, with the block that its worker will probably load next."""
        if tells_following(len(self._passed(place)), len(self._chunks)) and self._foretold.told(worker) is None:
            # Workers that have nothing to do go first.
            self._foretold.foretell(worker, [block for _, block in self._waiting()][idle:])
        following = self._foretold.told(worker)
        if following == _HEAD[1]:
            following = None  # it is no block
        return dataclasses.replace(call, following=following)

    def _waiting(self) -> Iterator[Place]:
        """The places that no worker has and that chunks are still to pass, in the order in which workers come there."""
        steps = [(step, self._turns[chunk]) for chunk, step in self._steps.items() if step is not None]
        furthest = max((turn for _, turn in steps), default=0)
        forward = [(step.block, turn) for step, turn in steps if isinstance(step, ForwardChunk)]
        forth = range(min(forward)[0], max(turn for _, turn in forward) - 1) if forward else ()
        head = [_HEAD] if furthest > self._num_blocks else []
        back = range(min(furthest, self._num_blocks) - 1, min(self._open, default=self._num_blocks) - 1, -1)
        held = set(self._places.values())
        places = [(ForwardChunk, block) for block in forth], head, [(Backward, block) for block in back]
        for place in itertools.chain(*places):
            if place not in held and not self._passed(place).issuperset(self._chunks):
                yield place

    def _passed(self, place: Place) -> set[str]:
        """The chunks that have passed a place."""
        kind, block = place
        if kind is Backward:
            return self._energy[block]
        return self._hidden[block + 1] if kind is ForwardChunk else self._gradient[self._num_blocks]

    def _calls(self) -> "_OpenCalls":
        """The calls that can be made, and what is on its way; until something changes."""
        if self._open_calls is None:
            calls, held = list(self._candidates()), set(self._places.values())
            moving = [*self._taken, *(call for call in calls if _place(call) in held)]
            first = min((call.block for call in moving if isinstance(call, ForwardChunk)), default=self._num_blocks)
            last = max((call.block for call in moving if isinstance(call, Backward)), default=-1)
            comes_to_head = _HEAD in held and first < self._num_blocks
            if comes_to_head or any(isinstance(call, DifferentiateLoss) for call in moving):
                last = self._num_blocks
            left = [call for call in calls if call not in self._taken]
            free: dict[Place, Call] = {}
            for call in left:
                free.setdefault(_place(call), call)
            self._open_calls = _OpenCalls(free, Counter(map(_place, left)), self._num_blocks, first, last)
        return self._open_calls

    def _candidates(self) -> Iterator[Call]:
        """The calls whose inputs are there, the most urgent first, whether they are being made or not."""
        if EMBED not in self.finished:
            yield Embed()
            return
        for chunk in self._chunks:
            if chunk not in self._steps:
                self._steps[chunk] = self._next_step(chunk)
        steps = [step for chunk in self._chunks if (step := self._steps[chunk]) is not None]
        backward = {step.block for step in steps if isinstance(step, Backward)}
        # Behind it the gradients before the block are dropped, which may be wanted once more for one that is lost.
        for block in sorted(self._open - backward, reverse=True):
            if self._energy[block].issuperset(self._chunks):
                yield WeighTokens(block)
        yield from sorted((step for step in steps if isinstance(step, Backward)), key=lambda step: -step.block)
        yield from (step for step in steps if isinstance(step, DifferentiateLoss))
        yield from sorted((step for step in steps if isinstance(step, ForwardChunk)), key=lambda step: step.block)

    def _next_step(self, chunk: str) -> _Passing | None:
        """The next call on the way of a chunk; None where nothing is left."""
        block = self._lacking(chunk)
        if block is None:
            return None
        gradient_at = next((g for g in range(block + 1, self._num_blocks + 1) if chunk in self._gradient[g]), None)
        self._turns[chunk] = turn = self._num_blocks + 1 if gradient_at is None else gradient_at
        goal = turn - 1
        at = self._furthest(chunk, goal)
        assert at is not None, "a chunk that is nowhere on its way is embedded anew"
        if at < goal:
            return ForwardChunk(ORIGINAL, at, chunk, weights_unit(at))
        return DifferentiateLoss(chunk) if gradient_at is None else Backward(goal, chunk)

    def _lacking(self, chunk: str) -> int | None:
        """The last block whose weights are wanted and that lacks the energies of a chunk."""
        return max((block for block in self._open if chunk not in self._energy[block]), default=None)

    def _furthest(self, chunk: str, block: int) -> int | None:
        """The furthest block, at most `block`, whose input of a chunk is there."""
        return next((b for b in range(block, -1, -1) if chunk in self._hidden[b]), None)

    def _is_lost(self, chunk: str) -> bool:
        """Whether a chunk that is still wanted is nowhere on its way."""
        return self._lacking(chunk) is not None and chunk not in self._hidden[0]


@dataclasses.dataclass(frozen=True)
class _OpenCalls:
    """What can be done now, and what is on its way to blocks.

    Attributes:
        free: The first call of each place that can be made and is not being made, the most urgent place first.
        waiting: Number of such calls at each place.
        num_blocks: Number of blocks of the model.
        first: The first block that a chunk passes now, or will pass as a worker's next call; `num_blocks` for none.
        last: The last block that a gradient passes now, or will pass as a worker's next call; `num_blocks` where one is
            on its way to the last block.
    """

    free: dict[Place, Call]
    waiting: Counter[Place]
    num_blocks: int
    first: int
    last: int

    def feeds(self, place: Place) -> bool:
        """Tell whether a chunk, or a gradient, is on its way to a block."""
        direction, block = place
        if direction is Backward:
            return block < self.last
        return self.first < (self.num_blocks if direction is DifferentiateLoss else block)


def _place(call: Call) -> Place:
    return type(call), getattr(call, "block", -1)
