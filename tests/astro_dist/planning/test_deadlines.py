"""A call may take many times what a slow device needs for it, or the seconds that were asked for."""

from types import SimpleNamespace

import pytest

from astro_dist.planning.deadlines import deadlines
from astro_dist.planning.work import Work
from astro_dist.schedule.calls import LoadWeights, OpenBlock


@pytest.fixture
def limit(run_config):
    def of(work, device_type="cpu", **changes):
        cost = SimpleNamespace(work=lambda call: work)
        return deadlines(run_config(**changes), cost, device_type)(None)

    return of


def test_call_without_work_has_ten_minutes(limit):
    assert limit(Work()) == 600


def test_deadline_grows_with_operations_by_device_and_with_bytes(limit):
    assert limit(Work(1e12)) == 600 + 20 * 1e12 / 5e9
    assert limit(Work(1e12, rounded=2e12, exact=3e12)) == 600 + 20 * 6e12 / 5e9
    assert limit(Work(1e12), execution__threads_per_worker=4) == 600 + 20 * 1e12 / 2e10
    assert limit(Work(1e12), "cuda") == 620
    assert limit(Work(moved_bytes=5e9)) == 1600


def test_seconds_that_are_asked_for_hold_for_any_work(limit):
    assert limit(Work(1e18), execution__call_timeout_s=7.0) == 7


@pytest.mark.parametrize("call", [LoadWeights(0, "unit", was_foretold=True), OpenBlock(0, 0, was_foretold=True)])
def test_weights_that_should_have_been_read_may_be_yet_to_be_read(run_config, call):
    cost = SimpleNamespace(work=lambda call: Work(moved_bytes=0.0 if call.was_foretold else 5e9))
    assert deadlines(run_config(), cost, "cuda")(call) == 1600
