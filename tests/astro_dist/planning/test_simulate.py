"""Simulated workers share the calls of the real schedule."""

import pytest
import torch

from astro_dist.planning.cost import CostModel
from astro_dist.planning.planned_run import PlannedRun
from astro_dist.planning.simulate import simulate
from astro_dist.planning.validate import prepare
from astro_dist.schedule.factory import schedule_of
from astro_dist.schedule.schedule import RunShape
from astro_dist.source.calibration_text import chunk_tokens


@pytest.fixture
def simulated(run_config):
    prepared = prepare(run_config())
    plan, config = prepared.plan, prepared.config
    tokens = chunk_tokens(config.calibration)
    cost = CostModel(PlannedRun(plan, config, tokens, torch.float32, "cpu"))

    def run(workers, seconds=lambda call: 1.0):
        schedule = schedule_of(config, RunShape(len(plan.blocks), len(plan.copies), list(tokens)))
        return simulate(schedule, workers, seconds, cost.result)

    return run


def test_a_single_worker_takes_the_sum_of_all_calls(simulated):
    calls = []
    result = simulated(1, lambda call: calls.append(call) or 2.0)
    assert result.wall_s == result.busy_s == sum(result.by_verb.values()) == 2.0 * len(calls)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_more_workers_are_never_slower_than_one(simulated, workers):
    assert simulated(workers).wall_s <= simulated(1).wall_s


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_efficiency_is_at_most_1(simulated, workers):
    assert 0 < simulated(workers).efficiency(workers) <= 1
