"""What the driver does where nothing goes on, and which error it tells where no worker can be brought up."""

from collections import deque
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from astro.errors import RunError
from astro_dist import pipeline
from astro_dist.execution.driver import Driver, Limits
from astro_dist.execution.executor import Failed, Joined, Returned
from astro_dist.run_directory.unit_record import CopyResult, UnitRecord
from astro_dist.schedule.calls import CopyTensors
from astro_dist.schedule.unit_words import UnitWords
from astro_dist.worker.worker import Worker


class Executor:
    """One worker that does every call at once; or events that are given."""

    enforces_deadlines = True

    def __init__(self, *events):
        self.events, self.workers = deque(events), [0] if not events else []

    def idle(self):
        return self.workers

    def submit(self, worker, call):
        record = UnitRecord("copy", "", (), CopyResult(bytes_read=0))
        self.events.append(Returned(worker, record))

    def wait(self, timeout_s):
        return self.events.popleft() if self.events else None

    def report(self, figures):
        pass


class Schedule:
    """Copies tensors; None in place of a call is a time in which none can be made, until the state is read anew."""

    def __init__(self, calls):
        self.calls, self.finished, self.units = calls, set(), []

    @property
    def complete(self):
        return not self.calls

    def holds(self, worker):
        return False

    def next_call(self, worker, idle=0):
        return self.calls[0]

    def done(self, worker, call, result):
        self.finished.add(self.calls.popleft().unit)
        return []


def drive(executor, calls=(), worker_timeout_s=60.0, display=None):
    calls, notes = deque(calls), []

    def plan_anew():
        calls.popleft()
        return Schedule(calls)

    run = SimpleNamespace(journal=SimpleNamespace(note=lambda event, **_: notes.append(event)))
    limits = Limits(3, lambda call: 60.0, worker_timeout_s)
    display = display or MagicMock()
    display.configure_mock(words=UnitWords(3), figures=lambda: SimpleNamespace(seconds_left=None))
    driver = Driver(executor, run, display, limits, plan_anew, lambda now: None)
    driver.run(Schedule(calls))
    return notes


def test_a_quiet_log_is_written_while_the_workers_are_at_work():
    display = MagicMock()
    drive(Executor(), [CopyTensors(0), CopyTensors(1)], display=display)
    order = [call[0] for call in display.method_calls if call[0] in ("started", "passed", "ended")]
    assert order == ["started", "passed", "ended"] * 2


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("astro_dist.execution.patience._STUCK_S", 0.05)


def test_second_stall_after_calls_were_made_reads_the_state_anew_once_more(impatient):
    notes = drive(Executor(), [None, CopyTensors(0), None, CopyTensors(1)])
    assert (notes.count("stuck"), notes.count("finished")) == (2, 2)


def test_stall_straight_after_the_state_was_read_anew_is_an_error(impatient):
    with pytest.raises(RunError, match="no call could be made .* a defect of the schedule"):
        drive(Executor(), [None, None, CopyTensors(0)])


def test_first_failure_is_told_where_no_worker_comes_up_again():
    lost, later = RunError("the worker died (killed)"), RunError("does not see the run directory")
    executor = Executor(Joined(0), Failed(0, lost, lost=True), Failed(1, later, lost=False))
    with pytest.raises(RunError, match=r"no worker was up .* It began with start, prepare on worker 0: the worker"):
        drive(executor, [CopyTensors(0)], worker_timeout_s=-1.0)


def test_cluster_whose_nodes_cannot_start_a_worker_is_not_called_down():
    cannot = RuntimeError("CUDA error: unknown error")
    executor = Executor(Joined(0), Failed(0, cannot, lost=False))
    with pytest.raises(
        RunError, match=r"no worker was up .*; the nodes are there, but none .* CUDA error: unknown"
    ) as e:
        drive(executor, [CopyTensors(0)], worker_timeout_s=-1.0)
    assert "cluster is down" not in str(e.value)


def test_first_failure_is_raised_where_no_worker_ever_started():
    lost, later = RunError("the worker died (killed)"), RunError("does not see the run directory")
    executor = Executor(Failed(0, lost, lost=True), Failed(1, later, lost=False))
    with pytest.raises(RunError, match=r"worker 0: the worker died .* could not start: does not see") as caught:
        drive(executor, [CopyTensors(0)])
    assert caught.value.__cause__ is lost


def test_replacement_that_cannot_start_does_not_hide_why_the_first_worker_is_gone(run_config, monkeypatch):
    real, starts = Worker.prepare, []

    def prepare(self):
        starts.append(self)
        if len(starts) > 1:
            raise RuntimeError("out of memory")
        real(self)

    def fail(self, call):
        raise RunError("disk gone")

    monkeypatch.setattr(Worker, "prepare", prepare)
    monkeypatch.setattr(Worker, "solve_block", fail)
    with pytest.raises(RunError, match=r"solve block on worker 0: disk gone\. .* could not start: RuntimeError: out"):
        pipeline.quantize(run_config())


def test_defect_ends_the_run_at_its_first_appearance(run_config, monkeypatch):
    calls = []

    def fail(self, call):
        calls.append(call)
        raise TypeError("no such argument")

    monkeypatch.setattr(Worker, "solve_block", fail)
    with pytest.raises(RunError, match=r"solve block on worker 0: TypeError: no such argument\. This is a defect"):
        pipeline.quantize(run_config())
    assert len(calls) == 1
