"""The figures of a run that is going on: counted here, and read by the display, by metrics and by trackers."""

import dataclasses
import time
from collections import deque
from collections.abc import Collection, Mapping

from astro_dist.planning.outlook import Outlook
from astro_dist.run_directory.unit_record import BlockResult
from astro_dist.schedule.calls import Call, Forward, ForwardChunk
from astro_dist.schedule.names import is_block_unit, is_held_out
from astro_dist.schedule.unit_words import UnitWords

__all__ = ["FIGURES", "FigureCounter", "RunFigures", "Shape"]

_LEAST_DONE = 0.02
"""Share of a session's work that must be done before the time that is left is told."""
_WINDOW_S = 300.0
"""Length of the time over which the rate of tokens is measured, in seconds."""

FIGURES = {
    "blocks": "Number of blocks to quantize, over all rounds.",
    "blocks_done": "Number of blocks that are quantized.",
    "share_done": "Share of the session's work that is done, from 0 to 1.",
    "seconds_left": "Time until the session's end, in seconds; missing while too little is done to tell.",
    "tokens_per_second": "Calibration tokens that passed a block's forward, per second, over all workers.",
    "largest_layer_error": "Largest relative output error of a layer; missing before the first block is done.",
    "retries": "Number of calls of this session that failed and are done again.",
    "workers": "Number of workers that are up.",
    "worker_memory_bytes": "Largest memory of a worker's device, or of its process without a GPU, in bytes; missing "
    "before the first block is done.",
}
"""What each figure means that is a number, by its name in `RunFigures`."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What has to be known of a run beforehand.

    Attributes:
        num_blocks: Number of blocks of the model.
        rounds: Number of passes over the model.
        chunks: Number of tokens of each chunk by its name, in the order in which the chunks travel.
    """

    num_blocks: int
    rounds: int
    chunks: Mapping[str, int]

    @property
    def words(self) -> UnitWords:
        """Return what people are told instead of the names of units."""
        return UnitWords(self.num_blocks, self.rounds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFigures:
    """Says how far a run is at one moment, and how good its result is so far.

    Attributes:
        blocks: Number of blocks to quantize, over all rounds.
        blocks_done: Number of blocks that are quantized.
        share_done: Share of the session's work that is done, from 0 to 1.
        seconds_left: Time until the session's end, in seconds; None while too little is done to tell.
        tokens_per_second: Rate at which calibration tokens pass a block's forward, over all workers.
        largest_layer_error: Largest relative output error of a layer; None before the first block is done.
        worst_layer: Name of the layer, or of the layers that were solved together, with that error; empty before.
        retries: Number of calls of this session that failed and are done again.
        workers: Number of workers that are up.
        worker_memory_bytes: Largest memory of a worker in bytes; None before the first block is done.
    """

    blocks: int
    blocks_done: int
    share_done: float
    seconds_left: float | None
    tokens_per_second: float
    largest_layer_error: float | None
    worst_layer: str
    retries: int
    workers: int
    worker_memory_bytes: int | None

    def numbers(self) -> dict[str, float]:
        """Return the figures that are known and are numbers, by the names of `FIGURES`."""
        values = {name: getattr(self, name) for name in FIGURES}
        return {name: float(value) for name, value in values.items() if value is not None}


class FigureCounter:
    """Counts what happens to workers and calls."""

    def __init__(self, shape: Shape, finished: Collection[str], outlook: Outlook) -> None:
        """Begin to count.

        Args:
            shape: What the run is like.
            finished: Names of the units that are finished already.
            outlook: Forecast of the session.
        """
        self._shape, self._outlook = shape, outlook
        self._blocks_done = sum(map(is_block_unit, finished))
        self._calls: dict[int, tuple[Call, float]] = {}
        self._workers: set[int] = set()
        self._retries, self._worst, self._peak_bytes = 0, ("", 0.0), 0
        self._begun: float | None = None
        self._passed: deque[tuple[float, int]] = deque()

    @property
    def idle(self) -> int:
        """The number of workers that have nothing to do."""
        return len(self._workers - self._calls.keys())

    def calls(self) -> dict[int, tuple[Call, float]]:
        """Return the call that each busy worker is at, and for how many seconds, by the worker's number."""
        now = time.monotonic()
        return {worker: (call, now - since) for worker, (call, since) in self._calls.items()}

    def joined(self, worker: int) -> None:
        """Count a worker that is up.

        Args:
            worker: Number of the worker.
        """
        self._workers.add(worker)
        self._outlook.resized(len(self._workers))

    def left(self, worker: int) -> None:
        """Count a worker that is gone. Its call, if it had one, is done again.

        Args:
            worker: Number of the worker.
        """
        self._retries += self._calls.pop(worker, None) is not None
        self._workers.discard(worker)
        self._outlook.resized(len(self._workers))

    def started(self, worker: int, call: Call) -> None:
        """Count a call that a worker began.

        Args:
            worker: Number of the worker.
            call: Call that it began.
        """
        now = time.monotonic()
        self._calls[worker] = (call, now)
        self._begun = now if self._begun is None else self._begun

    def ended(self, worker: int, call: Call, finished: Collection[str] | None, result: object) -> None:
        """Count a call that returned.

        Args:
            worker: Number of the worker.
            call: Call that returned.
            finished: Names of all finished units, if the call finished a unit; else None.
            result: Figures of the unit, if the call finished one that has figures.
        """
        now = time.monotonic()
        _, since = self._calls.pop(worker, (call, now))
        self._outlook.took(call, now - since)
        if isinstance(call, Forward | ForwardChunk) and not is_held_out(call.chunk):
            self._passed.append((now, self._shape.chunks[call.chunk]))
        if isinstance(result, BlockResult):
            self._peak_bytes = max(self._peak_bytes, result.peak_device_bytes or result.peak_rss_bytes)
            for layer in result.layers:
                self._worst = max(self._worst, (layer.name, layer.relative_error), key=lambda named: named[1])
        if finished is not None:
            self._blocks_done = sum(map(is_block_unit, finished))

    def figures(self) -> RunFigures:
        """Return the figures of this moment."""
        share_done = self._outlook.share_done
        name, error = self._worst
        return RunFigures(
            blocks=self._shape.num_blocks * self._shape.rounds,
            blocks_done=self._blocks_done,
            share_done=share_done,
            seconds_left=self._outlook.seconds_left if share_done >= _LEAST_DONE else None,
            tokens_per_second=self._tokens_per_second(),
            largest_layer_error=error if name else None,
            worst_layer=name,
            retries=self._retries,
            workers=len(self._workers),
            worker_memory_bytes=self._peak_bytes or None,
        )

    def _tokens_per_second(self) -> float:
        """The rate over the last minutes, or since the first call if that was later."""
        now = time.monotonic()
        while self._passed and self._passed[0][0] < now - _WINDOW_S:
            self._passed.popleft()
        tokens = sum(count for _, count in self._passed)
        return tokens / max(min(now - (self._begun or now), _WINDOW_S), 1e-9) if tokens else 0.0
