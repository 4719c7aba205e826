"""The time that is left is foretold within a fifth, although the plan knows neither the machine nor its oddities."""

import heapq
import random

import pytest
import torch

from astro_dist.planning.cost import CostModel
from astro_dist.planning.devices import DEVICES
from astro_dist.planning.outlook import Outlook
from astro_dist.planning.planned_run import PlannedRun
from astro_dist.planning.validate import prepare
from astro_dist.schedule.factory import schedule_of
from astro_dist.schedule.schedule import RunShape, assign
from astro_dist.source.calibration_text import chunk_tokens

SLOWER = {"forward": 40.0, "solve block": 110.0, "backward": 70.0}


@pytest.fixture
def make(run_config):
    """Makes the schedule of a run, its cost model, and what the plan foretells for a call."""

    def made(**changes):
        sizes = {"samples": 32, "chunk_samples": 2, "sequence_length": 16, "holdout_samples": 4}
        prepared = prepare(run_config(**{f"calibration__{key}": value for key, value in sizes.items()}, **changes))
        plan, config = prepared.plan, prepared.config
        tokens = chunk_tokens(config.calibration)
        cost = CostModel(PlannedRun(plan, config, tokens, torch.float32, "cpu"))
        schedule = schedule_of(config, RunShape(len(plan.blocks), len(plan.copies), list(tokens)))
        return schedule, cost, lambda call: cost.seconds(call, DEVICES["h100"])

    return made


def play(schedule, cost, outlook, workers, seconds):
    """Run a schedule on simulated workers; the time, the time left and the share done after each call."""
    now, ends, free, told = 0.0, [], list(range(workers)), []
    while not schedule.complete:
        for worker, call in list(assign(schedule, free)):
            took = seconds(call)
            heapq.heappush(ends, (now + took, worker, took, call))
            free.remove(worker)
        now, worker, took, call = heapq.heappop(ends)
        schedule.done(worker, call, cost.result(call))
        outlook.took(call, took)
        free = sorted([*free, worker])
        told.append((now, outlook.seconds_left, outlook.share_done))
    return told


@pytest.mark.parametrize("changes", [{}, {"execution__mode": "sequential"}, {"calibration__token_weights": "norm"}])
@pytest.mark.parametrize("workers", [1, 2])
def test_time_left_is_right_within_a_fifth_after_a_quarter(make, changes, workers):
    schedule, cost, foretold = make(**changes)
    dice = random.Random(0)
    outlook = Outlook(schedule, workers, foretold, cost.result)
    told = play(
        schedule, cost, outlook, workers,
        lambda call: foretold(call) * SLOWER.get(call.verb, 60.0) * dice.uniform(0.9, 1.1),
    )  # fmt: skip
    end = told[-1][0]
    later = [(now, left) for now, left, _ in told if now >= end / 4]
    assert max(abs(now + left - end) for now, left in later) < 0.2 * end


def test_looking_ahead_alters_no_schedule(make):
    schedule, cost, foretold = make()
    Outlook(schedule, 2, foretold, cost.result)
    assert not schedule.complete
    assert not schedule.finished


def test_share_grows_from_none_to_all(make):
    schedule, cost, foretold = make()
    outlook = Outlook(schedule, 1, foretold, cost.result)
    assert (outlook.share_done, outlook.seconds_left > 0) == (0.0, True)
    shares = [share for _, _, share in play(schedule, cost, outlook, 1, foretold)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert outlook.seconds_left == 0.0


def test_fewer_workers_take_longer(make):
    schedule, cost, foretold = make()
    outlook = Outlook(schedule, 2, foretold, cost.result)
    before = outlook.seconds_left
    outlook.resized(1)
    assert outlook.seconds_left == pytest.approx(2 * before)
    outlook.resized(0)  # all are gone: one will come back
    assert outlook.seconds_left == pytest.approx(2 * before)
