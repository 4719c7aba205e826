"""The display of a run: live on a terminal, plain lines in a log, and always on stderr."""

import time
from collections.abc import Collection
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from astro_dist.console import in_words, say
from astro_dist.schedule.calls import (
    AccumulateHessians,
    Backward,
    Call,
    CopyTensors,
    DifferentiateLoss,
    Embed,
    EvaluateLoss,
    FinishEvaluation,
    Forward,
    ForwardChunk,
    MergeHessians,
    OpenBlock,
    SolveBlock,
    SolveRows,
    SplitBlock,
    TryBetas,
    WeighTokens,
    WriteBlock,
)
from astro_dist.schedule.names import is_block_unit

__all__ = ["ProgressDisplay"]

_PHASES: dict[type[Call], str] = {
    Embed: "embedding",
    CopyTensors: "copying",
    OpenBlock: "reading",
    Forward: "forward",
    SolveBlock: "solving",
    SplitBlock: "splitting",
    AccumulateHessians: "collecting",
    MergeHessians: "deciding",
    TryBetas: "choosing beta",
    SolveRows: "solving",
    WriteBlock: "writing",
    ForwardChunk: "passing on",
    FinishEvaluation: "evaluating",
    EvaluateLoss: "measuring perplexity",
    DifferentiateLoss: "differentiating the loss",
    Backward: "backward",
    WeighTokens: "weighing tokens",
}


_LEAST_DONE = 0.1
"""Share of a session's units that must be done before the time that is left is told: the first take longer to come."""


class ProgressDisplay:
    """Shows how many blocks are done, what each worker does, and how much time is left."""

    def __init__(self, total: int, finished: int, num_blocks: int, blocks_done: int) -> None:
        """Prepare the display; nothing is shown yet.

        Args:
            total: Number of all units of the run.
            finished: Number of units that are finished already.
            num_blocks: Number of blocks to quantize, over all rounds.
            blocks_done: Number of blocks that are quantized already.
        """
        self._console = Console(stderr=True)
        self._begin, self._before = time.monotonic(), finished
        self._total, self._finished = total, finished
        self._num_blocks, self._blocks_done = num_blocks, blocks_done
        self._bar = Progress(
            TextColumn("[bold]blocks  "),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._phases = Progress(TextColumn("{task.description}"), TextColumn("{task.fields[phase]}"))
        self._all: TaskID = self._bar.add_task("blocks", total=num_blocks, completed=blocks_done, left="")
        self._rows: dict[int, TaskID] = {}
        shown = Group(self._bar, self._phases)
        self._live = Live(shown, console=self._console, refresh_per_second=4) if self._console.is_terminal else None

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
        self._rows[worker] = self._phases.add_task(f"worker {worker}", phase="idle")

    def left(self, worker: int) -> None:
        """Show that a worker is gone.

        Args:
            worker: Number of the worker.
        """
        if worker in self._rows:
            self._phases.remove_task(self._rows.pop(worker))

    def started(self, worker: int, call: Call) -> None:
        """Show that a worker began a call.

        Args:
            worker: Number of the worker.
            call: Call that it began.
        """
        self._show(worker, f"{call.unit}: {_PHASES[type(call)]}{_detail(call)}")

    def ended(self, worker: int, call: Call, finished: Collection[str] | None) -> None:
        """Show that a call of a worker returned.

        Args:
            worker: Number of the worker.
            call: Call that returned.
            finished: Names of all finished units, if the call finished a unit; else None.
        """
        self._show(worker, "idle")
        if finished is None:
            return
        self._finished, self._blocks_done = len(finished), sum(map(is_block_unit, finished))
        left = self._time_left()
        self._bar.update(self._all, completed=self._blocks_done, left=left)
        if not self._live and (is_block_unit(call.unit) or isinstance(call, EvaluateLoss | WeighTokens)):
            done = f"{self._blocks_done} of {self._num_blocks} blocks"
            self.say(f"{call.unit} done by worker {worker}; {', '.join(filter(None, (done, left)))}")

    def say(self, text: str) -> None:
        """Print a line that stays.

        Args:
            text: Content of the line.
        """
        say(text, self._console)

    def _show(self, worker: int, phase: str) -> None:
        if worker in self._rows:
            self._phases.update(self._rows[worker], phase=phase)

    def _time_left(self) -> str:
        """The time that is left in words; empty while too little is done to tell."""
        done = self._finished - self._before
        if done < _LEAST_DONE * (self._total - self._before):
            return ""
        seconds = (time.monotonic() - self._begin) / done * (self._total - self._finished)
        return f"about {in_words(seconds)} left"


def _detail(call: Call) -> str:
    """What tells a call from others of its kind: the chunk, or a number."""
    match call:
        case Forward(chunk=detail) | ForwardChunk(chunk=detail) | Backward(chunk=detail):
            return f" {detail}"
        case AccumulateHessians(share=number) | TryBetas(tile=number) | SolveRows(tile=number):
            return f" {number}"
    return ""
