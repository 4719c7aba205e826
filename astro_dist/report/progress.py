"""The display of a run: live on a terminal, plain lines in a log, and always on stderr."""

import dataclasses
import time
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from astro_dist.console import in_words, say
from astro_dist.planning.outlook import Outlook
from astro_dist.report.call_words import worker_lines
from astro_dist.run_directory.unit_record import BlockResult
from astro_dist.schedule.calls import Call, EvaluateLoss, WeighTokens
from astro_dist.schedule.names import is_block_unit

__all__ = ["ProgressDisplay", "Shape"]

_LEAST_DONE = 0.02
"""Share of a session's work that must be done before the time that is left is told."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the display has to know of a run beforehand.

    Attributes:
        num_blocks: Number of blocks of the model.
        rounds: Number of passes over the model.
        chunks: Names of all chunks, in the order in which they travel.
    """

    num_blocks: int
    rounds: int
    chunks: Sequence[str]


class ProgressDisplay:
    """Shows how much is done, what each worker does, how good the result is so far, and how much time is left."""

    def __init__(self, shape: Shape, finished: Collection[str], outlook: Outlook) -> None:
        """Prepare the display; nothing is shown yet.

        Args:
            shape: What the run is like.
            finished: Names of the units that are finished already.
            outlook: Forecast of the session.
        """
        self._console = Console(stderr=True)
        self._shape, self._outlook = shape, outlook
        self._total = shape.num_blocks * shape.rounds
        self._blocks_done = sum(map(is_block_unit, finished))
        self._calls: dict[int, tuple[Call, float]] = {}
        self._workers: set[int] = set()
        self._retries, self._worst, self._peak_bytes = 0, ("", 0.0), 0
        self._bar = Progress(
            TextColumn("[bold]{task.fields[blocks]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[left]}"),
            TimeElapsedColumn(),
            console=self._console,
            expand=True,
        )
        self._all: TaskID = self._bar.add_task("", total=1.0, blocks=self._blocks_in_words(), left="")
        self._live = (
            Live(console=self._console, refresh_per_second=4, transient=True, get_renderable=self._picture)
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def joined(self, worker: int) -> None:
        """Show that a worker is up.

        Args:
            worker: Number of the worker.
        """
        self._workers.add(worker)
        self._outlook.resized(len(self._workers))

    def left(self, worker: int) -> None:
        """Show that a worker is gone. Its call, if it had one, is done again.

        Args:
            worker: Number of the worker.
        """
        self._retries += self._calls.pop(worker, None) is not None
        self._workers.discard(worker)
        self._outlook.resized(len(self._workers))

    def started(self, worker: int, call: Call) -> None:
        """Show that a worker began a call.

        Args:
            worker: Number of the worker.
            call: Call that it began.
        """
        self._calls[worker] = (call, time.monotonic())

    def ended(self, worker: int, call: Call, finished: Collection[str] | None, result: object = None) -> None:
        """Show that a call of a worker returned.

        Args:
            worker: Number of the worker.
            call: Call that returned.
            finished: Names of all finished units, if the call finished a unit; else None.
            result: Figures of the unit, if the call finished one that has figures.
        """
        _, since = self._calls.pop(worker, (call, time.monotonic()))
        self._outlook.took(call, time.monotonic() - since)
        if isinstance(result, BlockResult):
            self._judge(result)
        if finished is None:
            return
        self._blocks_done = sum(map(is_block_unit, finished))
        if not self._live and (is_block_unit(call.unit) or isinstance(call, EvaluateLoss | WeighTokens)):
            done = f"{self._blocks_done} of {self._total} blocks"
            self.say(f"{call.unit} done by worker {worker}; {', '.join(filter(None, (done, self._time_left())))}")

    def say(self, text: str) -> None:
        """Print a line that stays.

        Args:
            text: Content of the line.
        """
        say(text, self._console)

    def _judge(self, result: BlockResult) -> None:
        self._peak_bytes = max(self._peak_bytes, result.peak_device_bytes or result.peak_rss_bytes)
        for layer in result.layers:
            self._worst = max(self._worst, (layer.name, layer.relative_error), key=lambda named: named[1])

    def _picture(self) -> Group:
        """What the terminal shows at this moment."""
        now = time.monotonic()
        self._bar.update(
            self._all, completed=self._outlook.share_done, blocks=self._blocks_in_words(), left=self._time_left()
        )
        calls = {worker: (call, now - since) for worker, (call, since) in self._calls.items()}
        idle = len(self._workers - calls.keys())
        lines = worker_lines(calls, idle, self._shape.num_blocks, self._shape.chunks)
        texts = [Text(line, no_wrap=True, overflow="ellipsis") for line in filter(None, (self._figures(), *lines))]
        return Group(self._bar, *texts)

    def _figures(self) -> str:
        """How good the result is so far, and what it takes."""
        name, error = self._worst
        figures = (
            f"largest layer error {error:.3g} ({name.partition('+')[0]})" if name else "",
            f"{decimal(self._peak_bytes)} a worker" if self._peak_bytes else "",
            "" if not self._retries else "1 retry" if self._retries == 1 else f"{self._retries} retries",
        )
        return " · ".join(filter(None, figures))

    def _blocks_in_words(self) -> str:
        return f"{self._blocks_done}/{self._total} blocks"

    def _time_left(self) -> str:
        """The time that is left in words; empty while too little is done to tell."""
        if self._outlook.share_done < _LEAST_DONE:
            return ""
        return f"about {in_words(self._outlook.seconds_left)} left"
