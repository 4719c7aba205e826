"""The driver's loop: it gives calls to workers that are free, and goes on when calls fail."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from astro.errors import AstroError, DamagedError, RunError, StorageError
from astro_dist.execution.end_notes import EndNotes
from astro_dist.execution.executor import Event, Executor, Failed, Joined
from astro_dist.execution.failure import Failure, FailureHistory, Kind, is_defect, kind_of
from astro_dist.execution.patience import Patience
from astro_dist.execution.work_log import WorkLog
from astro_dist.report.progress import ProgressDisplay
from astro_dist.run_directory.journal import Journal
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.unit_record import UnitRecord
from astro_dist.schedule.calls import Call, DifferentiateLoss, FinishingCall, ForwardChunk, LoadWeights, Result
from astro_dist.schedule.schedule import Schedule, assign

__all__ = ["Driver", "Limits"]

_TICK_S = 1.0
_START = "start"
"""What stands for the unit where a worker could not start."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Says how many failures and how much time a run allows.

    Attributes:
        max_retries: Number of times that a call, or a whole block that one worker holds, is tried again.
        deadline_of: Function that returns after how many seconds a call counts as hung.
        worker_timeout_s: Seconds without any worker after which the run fails.
    """

    max_retries: int
    deadline_of: Callable[[Call], float]
    worker_timeout_s: float


@dataclasses.dataclass(frozen=True)
class _Running:
    """A call that a worker is at.

    Attributes:
        call: Call that the worker is at.
        since: Time on the monotonic clock from which the call's deadline is counted, in seconds.
    """

    call: Call
    since: float


@dataclasses.dataclass
class _Trouble:
    """What went wrong since a worker last joined or brought a result.

    Attributes:
        first: First failure and its error; None where there was none.
        is_stale: Whether the state of the run is to be read again from its directory, once no call is running.
        was_stuck: Whether it was read again because no call could be given out, and no call has returned since.
    """

    first: tuple[Failure, Exception] | None = None
    is_stale: bool = False
    was_stuck: bool = False


class _Notes:
    """Writes notes to the journal. Those that a full disk refuses are kept and written later."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._unwritten: list[tuple[str, dict[str, Any]]] = []

    def add(self, event: str, **details: Any) -> None:
        """Keep a note, with the time of now, until it is written."""
        self._unwritten.append((event, {"time": round(time.time(), 3), **details}))

    def write(self) -> None:
        """Write the notes that are not written yet, the oldest first.

        Raises:
            StorageError: The file system refused.
        """
        while self._unwritten:
            event, details = self._unwritten[0]
            self._journal.note(event, **details)
            self._unwritten.pop(0)


class Driver:
    """Runs a schedule to its end, on the workers of an executor.

    A failed call goes back to the schedule, and another worker does it, as often as the limits allow. When a file of
    the run is found damaged, the state of the run is read again from the run directory, as when a run goes on.
    """

    def __init__(
        self,
        executor: Executor,
        run: RunDirectory,
        display: ProgressDisplay,
        limits: Limits,
        plan_anew: Callable[[], Schedule],
        on_finished: Callable[[Schedule], None],
    ) -> None:
        """Prepare to run; nothing is started.

        Args:
            executor: Executor that brings up the workers.
            run: Run directory.
            display: Display that shows a person how the run goes.
            limits: Failures and time that the run allows.
            plan_anew: Function that makes the schedule from the files of the run directory.
            on_finished: Function that is called at the beginning and after each unit, before more calls are given out.
        """
        self._executor, self._run, self._display, self._limits = executor, run, display, limits
        self._plan_anew, self._on_finished = plan_anew, on_finished
        self._history = FailureHistory(limits.max_retries)
        self._running: dict[int, _Running] = {}
        self._begun: set[str] = set()
        self._patience = Patience(limits.worker_timeout_s)
        self._trouble = _Trouble()
        self._notes = _Notes(run.journal)
        self._joined = False
        self._work, self._end_notes = WorkLog(self._note), EndNotes(self._note)

    def run(self, schedule: Schedule) -> None:
        """Do every unit that is not finished.

        Args:
            schedule: Schedule of the run, as it is at the beginning.

        Raises:
            AstroError: A unit failed too often, or there is no worker left. What is finished is kept.
        """
        try:
            self._do_all(schedule)
        finally:
            self._work.close()
        self._notes.write()

    def _do_all(self, schedule: Schedule) -> None:
        self._on_finished(schedule)
        while not schedule.complete:
            if self._trouble.is_stale and not self._running:
                schedule, self._trouble.is_stale = self._plan_anew(), False
                self._on_finished(schedule)
            self._hand_out(schedule)
            self._display.passed()
            event = self._executor.wait(_TICK_S)
            while event is not None:  # take all that has happened before any call counts as late
                self._take(schedule, event)
                event = self._executor.wait(0.0)
            figures = self._display.figures()
            self._executor.report(figures)
            self._end_notes.saw(figures.seconds_left)
            self._end_overdue(schedule)
            self._require_workers()
            self._require_progress()

    def _hand_out(self, schedule: Schedule) -> None:
        if self._trouble.is_stale or self._patience.postpones:
            return
        for worker, call in assign(schedule, self._executor.idle()):
            self._running[worker] = _Running(call, time.monotonic())
            self._patience.saw_call()
            self._executor.submit(worker, call)
            self._work.began(worker, call.unit)
            self._display.started(worker, call)
            if call.unit not in self._begun and not isinstance(call, ForwardChunk | LoadWeights | DifferentiateLoss):
                self._begun.add(call.unit)
                self._note("began", unit=call.unit, worker=worker)

    def _take(self, schedule: Schedule, event: Event) -> None:
        self._patience.saw_call()  # a worker in this very process has just taken the time of its call
        if isinstance(event, Joined):
            self._joined, self._trouble.first = True, None
            self._display.joined(event.worker)
            self._note("joined", worker=event.worker)
        elif isinstance(event, Failed):
            self._judge(schedule, event, kind_of(event.error, event.lost))
        else:
            self._take_result(schedule, event.worker, self._running.pop(event.worker).call, event.result)

    def _take_result(self, schedule: Schedule, worker: int, call: Call, result: Result) -> None:
        self._trouble.first, self._trouble.was_stuck = None, False
        self._work.ended(worker)
        was_finished = call.unit in schedule.finished
        for spent in schedule.done(worker, call, result):
            self._run.drop(spent)
        finished = call.unit in schedule.finished and not was_finished
        figures = result.result if isinstance(result, UnitRecord) else None
        self._display.ended(worker, call, schedule.finished if finished else None, figures)
        if isinstance(call, ForwardChunk):
            self._note("passed", chunk=call.chunk, block=call.block, stream=call.stream, seconds=result)
        if finished:
            assert isinstance(result, UnitRecord)
            self._note("finished", unit=call.unit, worker=worker, seconds=dict(result.seconds))
            self._on_finished(schedule)

    def _judge(self, schedule: Schedule, event: Failed, kind: Kind) -> None:
        """Decide what to do about a worker that is gone; its call, if it had one, goes back to the schedule."""
        worker, error = event.worker, event.error
        running = self._running.pop(worker, None)
        self._display.left(worker)
        self._work.ended(worker)
        if isinstance(error, DamagedError) and self._run.is_sound(error.path):
            kind = "raised"  # only that worker could not read the file: nothing is to be made again
        unit, verb = (running.call.unit, running.call.verb) if running else (_START, "prepare")
        failure = Failure(unit, self._display.words.unit(unit), verb, worker, kind, _one_line(error))
        self._note("failed", **dataclasses.asdict(failure))
        self._display.say(_of(failure))
        self._trouble.first = self._trouble.first or (failure, error)
        if running is None:
            self._judge_start(event, kind)
        else:
            self._judge_call(schedule, running.call, failure, error)

    def _judge_start(self, event: Failed, kind: Kind) -> None:
        """Go on without a worker that could not start: a node that is not fit does not end a run on other nodes.

        Raises:
            AstroError: A worker could not start and none ever has, or no worker is left and none will come.
        """
        is_hopeless = (
            (isinstance(event.error, AstroError) or is_defect(event.error)) and kind != "lost" and not self._joined
        )
        is_last = not event.replaced and not self._running and not self._executor.idle()
        if not is_hopeless and not is_last:
            return
        assert self._trouble.first is not None
        failure, first = self._trouble.first
        if first is event.error and isinstance(first, AstroError):
            raise first
        addition = (
            "" if first is event.error else f". The worker in its place could not start: {_one_line(event.error)}"
        )
        raise RunError(f"{_of(failure)}{addition}") from first

    def _judge_call(self, schedule: Schedule, call: Call, failure: Failure, error: Exception) -> None:
        """Give a call that came to nothing back to the schedule, as often as the history of failures allows."""
        unit, worker, kind = failure.unit, failure.worker, failure.kind
        may_be_finished = isinstance(call, FinishingCall) and kind in ("lost", "overdue")
        record = self._run.finished(unit) if may_be_finished else None
        if record is not None:  # the worker was lost after it had written the record
            self._take_result(schedule, worker, call, record)
            return
        self._begun.discard(unit)
        schedule.failed(worker, call)
        if kind == "damaged" and isinstance(error, DamagedError):
            with contextlib.suppress(OSError):
                error.path.unlink(missing_ok=True)
            self._trouble.is_stale = True
        wait_s = self._history.judge(failure, call, error)
        if wait_s:
            self._patience.postpone(wait_s)

    def _end_overdue(self, schedule: Schedule) -> None:
        now, stood_still = time.monotonic(), self._patience.stood_still()
        for worker, running in list(self._running.items()):
            limit = self._limits.deadline_of(running.call)
            if stood_still:  # this is not the fault of the calls: their time is counted anew
                self._running[worker] = dataclasses.replace(running, since=now)
            elif now - running.since > limit and self._executor.enforces_deadlines:
                self._executor.discard(worker)
                late = RunError(f"took longer than its deadline of {limit:.0f} s")
                self._judge(schedule, Failed(worker, late, lost=True), "overdue")

    def _require_workers(self) -> None:
        if self._running or self._executor.idle():
            self._patience.saw_worker()
            return
        left = self._patience.worker_wait_s()
        if self._patience.is_report_due():
            state = "any more" if self._joined else "yet"
            self._display.say(
                f"no worker is up {state} after {self._patience.waited_s():.0f} s, longer than a start usually takes; "
                "perhaps new ones wait for room on the cluster, or their machines are busy (see `ray status`); the run "
                f"gives up in {left:.0f} s"
            )
        if left < 0:
            first = self._trouble.first
            begin = f" It began with {_of(first[0])}." if first else ""
            cause = "the cluster is down, or another job holds its CPUs or GPUs (see `ray status`)"
            if first and first[0].unit == _START and first[0].kind != "lost":
                cause = "the nodes are there, but none of them can start a worker"
            raise RunError(
                f"no worker was up for {self._limits.worker_timeout_s:.0f} s (execution.worker_timeout_s); "
                f"{cause}.{begin} What is finished is kept; run the same command to go on"
            ) from (first[1] if first else None)

    def _require_progress(self) -> None:
        if self._running or not self._executor.idle() or self._patience.postpones or self._trouble.is_stale:
            self._patience.saw_call()
        elif self._patience.is_stuck:
            if self._trouble.was_stuck:
                raise RunError(
                    f"no call could be made for {self._patience.stuck_s:.0f} s although workers are free; this is a "
                    "defect of the schedule. What is finished is kept; run the same command to go on"
                )
            self._note("stuck")
            self._display.say("nothing can be handed out; the state of the run is read anew")
            self._trouble.was_stuck = self._trouble.is_stale = True

    def _note(self, event: str, **details: Any) -> None:
        self._notes.add(event, **details)
        try:
            self._notes.write()
        except StorageError as error:
            self._display.say(str(error))


def _of(failure: Failure) -> str:
    return f"{failure.place}, {failure.method} on worker {failure.worker}: {failure.cause}"


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if isinstance(error, AstroError) else f"{type(error).__name__}: {text}"
