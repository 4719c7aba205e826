"""The driver's loop: hands calls to whichever worker is free, and outlives whatever they come to."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from astro.errors import AstroError, DamagedError, RunError, StorageError
from astro_dist.execution.executor import Event, Executor, Failed, Joined
from astro_dist.execution.failure import Failure, FailureHistory, Kind, kind_of
from astro_dist.report.progress import ProgressDisplay
from astro_dist.run_directory.records import RunDirectory
from astro_dist.schedule.calls import Call, Schedule, assign

__all__ = ["Driver"]

_TICK_S = 1.0
_STALL_S = 30.0
_TELL_S = 30.0
_STUCK_S = 120.0
"""Without anything to hand out although workers are free: the state of the run is read anew, once."""
_FINISHING = ("embed", "copy", "solve", "write", "conclude", "head")
"""Calls whose record is the last thing that they write."""


@dataclasses.dataclass(frozen=True)
class _Running:
    call: Call
    since: float


class Driver:
    """Runs a schedule to its end.

    A failed call goes back to the schedule and is done by another worker, as often as the history of failures allows.
    After a file of the run was found damaged, the state of the run is read anew from the run directory, as it is when
    a run goes on.
    """

    def __init__(
        self,
        executor: Executor,
        run: RunDirectory,
        plan_anew: Callable[[], Schedule],
        display: ProgressDisplay,
        history: FailureHistory,
        deadline_s: Callable[[Call], float],
        worker_timeout_s: float,
        on_finished: Callable[[Schedule], None],
    ) -> None:
        """Prepare to run; nothing is started.

        Args:
            executor: whose workers were started.
            run: the run directory.
            plan_anew: the schedule, from what the run directory holds.
            display: what a person sees.
            history: of failures, and what is to be done about them.
            deadline_s: seconds after which a call is taken to hang.
            worker_timeout_s: seconds without any worker after which the run fails.
            on_finished: called at the beginning and after each unit, before more is handed out.
        """
        self._executor, self._run, self._display, self._history = executor, run, display, history
        self._plan_anew, self._deadline_s, self._on_finished = plan_anew, deadline_s, on_finished
        self._worker_timeout_s = worker_timeout_s
        self._running: dict[int, _Running] = {}
        self._not_before = 0.0
        self._last_worker = self._last_told = self._last_look = self._last_call = time.monotonic()
        self._read_anew = False
        self._stale = False
        self._unnoted: list[tuple[str, dict[str, Any]]] = []
        self._joined = False
        self._begun: set[str] = set()

    def run(self, schedule: Schedule) -> None:
        """Do every unit that is not finished.

        Args:
            schedule: at the beginning.

        Raises:
            AstroError: a unit failed too often, or there is no worker left. What is finished is kept.
        """
        self._on_finished(schedule)
        while not schedule.complete:
            if self._stale and not self._running:
                schedule, self._stale = self._plan_anew(), False
                self._on_finished(schedule)
            self._hand_out(schedule)
            event = self._executor.wait(_TICK_S)
            while event is not None:  # everything that is there, before anything is said to be late
                self._take(schedule, event)
                event = self._executor.wait(0.0)
            self._end_overdue(schedule)
            self._require_workers()
            self._require_progress()
        self._note_again()

    def _hand_out(self, schedule: Schedule) -> None:
        if self._stale or time.monotonic() < self._not_before:
            return
        for worker, call in assign(schedule, self._executor.idle()):
            self._running[worker] = _Running(call, time.monotonic())
            self._last_call = time.monotonic()
            self._executor.submit(worker, call)
            self._display.started(worker, call)
            if call.unit not in self._begun and call.method != "pass_on":
                self._begun.add(call.unit)
                self._note("began", unit=call.unit, worker=worker)

    def _take(self, schedule: Schedule, event: Event) -> None:
        self._last_call = time.monotonic()  # of a worker in this very process the call took its time until now
        if isinstance(event, Joined):
            self._joined = True
            self._display.joined(event.worker)
            self._note("joined", worker=event.worker)
        elif isinstance(event, Failed):
            self._judge(schedule, event.worker, event.error, kind_of(event.error, event.lost))
        else:
            self._take_result(schedule, event.worker, self._running.pop(event.worker).call, event.result)

    def _take_result(self, schedule: Schedule, worker: int, call: Call, result: Any) -> None:
        known = call.unit in schedule.finished
        for spent in schedule.done(worker, call, result):
            self._run.drop(spent)
        finished = call.unit in schedule.finished and not known
        self._display.ended(worker, call, schedule.finished if finished else None)
        if call.method == "pass_on":
            stream, block, chunk = call.args
            self._note("passed", chunk=chunk, block=block, stream=stream, seconds=result)
        if finished:
            self._note("finished", unit=call.unit, worker=worker, seconds=dict(result.seconds))
            self._on_finished(schedule)

    def _judge(self, schedule: Schedule, worker: int, error: Exception, kind: Kind) -> None:
        """What to do about a worker that is gone; its call, if it had one, goes back to the schedule."""
        running = self._running.pop(worker, None)
        self._display.left(worker)
        if isinstance(error, DamagedError) and self._run.is_sound(error.path):
            kind = "raised"  # that worker could not read what is there: nothing is to be made again
        unit, method = (running.call.unit, running.call.method) if running else ("start", "prepare")
        failure = Failure(unit, method, worker, kind, _one_line(error))
        self._note("failed", **dataclasses.asdict(failure))
        self._display.say(f"{unit}, {method} on worker {worker}: {failure.cause}")
        if running is None:
            if isinstance(error, AstroError) and kind != "lost" and not self._joined:
                raise error  # the very first workers do not find what the driver sees: nothing will get better
            return  # one node that is not fit does not end a run that others go on with
        record = self._run.finished(unit) if method in _FINISHING and kind in ("lost", "overdue") else None
        if record is not None:  # it was lost after its last word was on disk
            self._take_result(schedule, worker, running.call, record)
            return
        self._begun.discard(unit)
        schedule.failed(worker, running.call)
        if kind == "damaged" and isinstance(error, DamagedError):
            with contextlib.suppress(OSError):
                error.path.unlink(missing_ok=True)
            self._stale = True
        wait_s = self._history.judge(failure, running.call, error)
        if wait_s:
            self._not_before = max(self._not_before, time.monotonic() + wait_s)

    def _end_overdue(self, schedule: Schedule) -> None:
        now = time.monotonic()
        stood_still, self._last_look = now - self._last_look > _STALL_S, now
        for worker, running in list(self._running.items()):
            limit = self._deadline_s(running.call)
            if stood_still:  # the driver itself, perhaps on a file system that hung for all: begin to count anew
                self._running[worker] = dataclasses.replace(running, since=now)
            elif now - running.since > limit and self._executor.enforces_deadlines:
                self._executor.discard(worker)
                self._judge(schedule, worker, RunError(f"took longer than its deadline of {limit:.0f} s"), "overdue")

    def _require_workers(self) -> None:
        now = time.monotonic()
        if self._running or self._executor.idle():
            self._last_worker = self._last_told = now
            return
        left = self._worker_timeout_s - (now - self._last_worker)
        if now - self._last_told > _TELL_S:
            self._last_told = now
            self._display.say(
                f"no worker is up; waits {left:.0f} s more for the cluster to have room, see `ray status`"
            )
        if left < 0:
            raise RunError(
                f"no worker was up for {self._worker_timeout_s:.0f} s (execution.worker_timeout_s); the cluster is "
                "down, or another job holds its CPUs or GPUs (see `ray status`). What is finished is kept; run the "
                "same command to go on"
            )

    def _require_progress(self) -> None:
        now = time.monotonic()
        if self._running or not self._executor.idle() or now < self._not_before or self._stale:
            self._last_call = now
        elif now - self._last_call > _STUCK_S:
            if self._read_anew:
                raise RunError(
                    f"no call could be made for {_STUCK_S:.0f} s although workers are free; this is a defect of the "
                    "schedule. What is finished is kept; run the same command to go on"
                )
            self._note("stuck")
            self._display.say("nothing can be handed out; the state of the run is read anew")
            self._read_anew = self._stale = True

    def _note(self, event: str, **details: Any) -> None:
        """Append to the journal; what a full disk refuses is kept for later."""
        self._unnoted.append((event, {"time": round(time.time(), 3), **details}))
        try:
            self._note_again()
        except StorageError as error:
            self._display.say(str(error))

    def _note_again(self) -> None:
        while self._unnoted:
            event, details = self._unnoted[0]
            self._run.journal.note(event, **details)
            self._unnoted.pop(0)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if isinstance(error, AstroError) else f"{type(error).__name__}: {text}"
