"""SIGTERM ends a command within the grace time: one line, exit code 143, no process left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from astro_dist.execution.termination import EXIT_CODE, MESSAGE, Terminated, Termination, keep_handler

ROOT = Path(__file__).parents[3]
STOPPED = f"{MESSAGE}; what is finished is kept, run the same command to go on"


@pytest.fixture
def start():
    """Start Python in a session of its own, so that all its processes can be found."""
    processes = []

    def call(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, arguments)]
        processes.append(
            subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
        )
        return processes[-1]

    yield call
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(process, text):
    assert any(text in line for line in process.stderr), f"it ended with {process.wait()} and never said {text!r}"


def ended(process):
    """Send SIGTERM and return exit code, the rest of stderr and the seconds that it took."""
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=40)[1]
    return process.returncode, rest, time.monotonic() - begin


def processes_of(session):
    """The processes of a session that have not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = status.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(status.parent.name)
    return found


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_run_is_stopped_in_order_and_the_same_command_goes_on(start, run_config, tmp_path, executor):
    changes = {"regularizer__iterations": 400, "execution__executor": executor}
    (tmp_path / "run.yaml").write_text(run_config(**changes).to_yaml())
    process = start("-m", "astro_dist", "quantize", tmp_path / "run.yaml")
    wait_for(process, "done by worker")
    code, rest, seconds = ended(process)
    assert (code, rest.splitlines()[-1]) == (143, STOPPED)
    assert "Traceback" not in rest
    assert seconds < 25
    time.sleep(1.0)
    assert processes_of(process.pid) == []
    assert (tmp_path / "run" / "records").is_dir()


WAITING = """
import sys, time
from astro_dist.execution import termination
termination._GRACE_S = 0.3
stop = termination.Termination()
stop.keeps_work = False
with stop.handled():
    try:
        print("ready", file=sys.stderr, flush=True)  # the signal may come at once
        time.sleep(60)
    finally:
        time.sleep(60)
"""


def test_a_process_that_hangs_while_it_clears_up_ends_all_the_same(start):
    process = start("-c", WAITING)
    wait_for(process, "ready")
    code, rest, seconds = ended(process)
    assert (code, rest) == (EXIT_CODE, f"{MESSAGE}; run the same command to begin anew\n")
    assert seconds < 10


def test_only_the_first_signal_raises_and_the_handler_is_put_back():
    before, termination = signal.getsignal(signal.SIGTERM), Termination()
    with termination.handled():
        handler = signal.getsignal(signal.SIGTERM)  # called by hand: a real signal would end this process in time
        with pytest.raises(Terminated):
            handler(signal.SIGTERM, None)
        handler(signal.SIGTERM, None)
    assert termination.has_come
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_library_that_sets_its_own_handler_does_not_keep_it():
    with Termination().handled():
        own = signal.getsignal(signal.SIGTERM)
        with keep_handler():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        assert signal.getsignal(signal.SIGTERM) == own
