"""The display of a run: live on a terminal, plain lines in a log, and always on stderr."""

import time
from collections.abc import Collection
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from astro_dist.console import in_words, say
from astro_dist.planning.outlook import Outlook
from astro_dist.report.call_words import worker_lines, workers_in_words
from astro_dist.report.run_figures import FigureCounter, RunFigures, Shape
from astro_dist.schedule.calls import Call, EvaluateLoss, SmoothChannels, WeighTokens
from astro_dist.schedule.names import is_block_unit
from astro_dist.schedule.unit_words import UnitWords
from astro_dist.wording import counted

__all__ = ["ProgressDisplay"]

_QUIET_S = 60.0
"""Seconds without a line after which a log says what the workers do, so that it shows that the run goes on."""


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
        self._shape, self._counter = shape, FigureCounter(shape, finished, outlook)
        self._bar = Progress(
            TextColumn("[bold]{task.fields[blocks]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[left]}"),
            TimeElapsedColumn(),
            console=self._console,
            expand=True,
        )
        self._last_line = time.monotonic()
        self._all: TaskID = self._bar.add_task("", total=1.0, blocks="", left="")
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

    @property
    def words(self) -> UnitWords:
        """Return what people are told instead of the names of units."""
        return self._shape.words

    def figures(self) -> RunFigures:
        """Return what is shown, as numbers."""
        return self._counter.figures()

    def joined(self, worker: int) -> None:
        """Show that a worker is up.

        Args:
            worker: Number of the worker.
        """
        self._counter.joined(worker)

    def left(self, worker: int) -> None:
        """Show that a worker is gone. Its call, if it had one, is done again.

        Args:
            worker: Number of the worker.
        """
        self._counter.left(worker)

    def started(self, worker: int, call: Call) -> None:
        """Show that a worker began a call.

        Args:
            worker: Number of the worker.
            call: Call that it began.
        """
        self._counter.started(worker, call)

    def ended(self, worker: int, call: Call, finished: Collection[str] | None, result: object = None) -> None:
        """Show that a call of a worker returned.

        Args:
            worker: Number of the worker.
            call: Call that returned.
            finished: Names of all finished units, if the call finished a unit; else None.
            result: Figures of the unit, if the call finished one that has figures.
        """
        self._counter.ended(worker, call, finished, result)
        if finished is None or self._live:
            return
        if is_block_unit(call.unit) or isinstance(call, EvaluateLoss | WeighTokens | SmoothChannels):
            self.say(f"{self.words.unit(call.unit)} done by worker {worker}; {_done(self.figures())}")

    def passed(self) -> None:
        """Take note that some time has passed. A log then says what the workers do, if it has been quiet for long."""
        if self._live or time.monotonic() - self._last_line < _QUIET_S:
            return
        counter, chunks = self._counter, tuple(self._shape.chunks)
        doing = workers_in_words(counter.calls(), counter.idle, self.words, chunks)
        self.say(f"{_done(self.figures())}; {doing}")

    def say(self, text: str) -> None:
        """Print a line that stays.

        Args:
            text: Content of the line.
        """
        self._last_line = time.monotonic()
        say(text, self._console)

    def _picture(self) -> Group:
        """What the terminal shows at this moment."""
        figures, counter = self.figures(), self._counter
        blocks = f"{figures.blocks_done}/{figures.blocks} blocks"
        self._bar.update(self._all, completed=figures.share_done, blocks=blocks, left=_time_left(figures))
        lines = worker_lines(counter.calls(), counter.idle, self.words, tuple(self._shape.chunks))
        texts = [Text(line, no_wrap=True, overflow="ellipsis") for line in filter(None, (_in_words(figures), *lines))]
        return Group(self._bar, *texts)


def _in_words(figures: RunFigures) -> str:
    """How good the result is so far, and what it takes. The name of a layer, which may be long, comes last."""
    rate, memory, error = figures.tokens_per_second, figures.worker_memory_bytes, figures.largest_layer_error
    parts = (
        f"{rate:,.0f} tokens/s" if rate >= 1 else "",
        f"{decimal(memory)} a worker" if memory is not None else "",
        counted(figures.retries, "retry", "retries") if figures.retries else "",
        f"largest layer error {error:.3g} ({figures.worst_layer.partition('+')[0]})" if error is not None else "",
    )
    return " · ".join(filter(None, parts))


def _done(figures: RunFigures) -> str:
    """How many blocks are done, and the time that is left."""
    blocks = f"{figures.blocks_done} of {figures.blocks} blocks"
    return ", ".join(filter(None, (blocks, _time_left(figures))))


def _time_left(figures: RunFigures) -> str:
    """The time that is left in words; empty while too little is done to tell."""
    return "" if figures.seconds_left is None else f"about {in_words(figures.seconds_left)} left"
