"""How long the driver waits before it says or does something about a standstill."""

import pytest

from astro_dist.execution import patience
from astro_dist.execution.patience import Patience


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    times = [1000.0]
    monkeypatch.setattr(patience.time, "monotonic", lambda: times[0])
    return times


def test_a_start_that_takes_as_long_as_usual_on_few_cores_is_no_alarm(clock):
    waiting = Patience(1800.0)
    told = []
    for seconds in range(0, 160, 5):
        clock[0] = 1000.0 + seconds
        told += [seconds] if waiting.is_report_due() else []
    assert told == [95, 130]
    assert (waiting.waited_s(), waiting.worker_wait_s()) == (155.0, 1645.0)


def test_a_worker_that_is_lost_has_as_much_time_for_another_start(clock):
    waiting = Patience(1800.0)
    clock[0] += 80.0
    waiting.saw_worker()
    clock[0] += 80.0
    assert not waiting.is_report_due()
    clock[0] += 11.0
    assert waiting.is_report_due()
