"""Token weights first, then the run's mode: one schedule, whose second part begins with what the first left."""

import pytest

from astro_dist.schedule.calls import (
    Backward,
    BatchParts,
    BlockParts,
    Embed,
    ForwardChunk,
    LoadWeights,
    SplitBlock,
    WeighTokens,
)
from astro_dist.schedule.factory import schedule_of
from astro_dist.schedule.names import EMBED, weights_unit
from astro_dist.schedule.schedule import NOTHING_DONE, RunShape, StartingPoint, assign
from astro_dist.schedule.spent import SpentInputs

SHAPE = RunShape(4, 1, ["c0000", "c0001", "h0000"])
MODES = {
    "blocks": {},
    "two rounds": {"execution__rounds": 2},
    "sequential": {"execution__mode": "sequential"},
}


def simulate(schedule, workers, calls=10**6):
    made = []
    while not schedule.complete and len(made) < calls:
        turn = list(assign(schedule, range(workers)))
        assert turn, "nothing can be done, and nothing is being done"
        for worker, call in turn:
            parts = isinstance(call, SplitBlock) or call.verb == "accumulate Hessians"
            schedule.done(worker, call, BlockParts((BatchParts(0, 1, 1),)) if parts else None)
            made.append(call)
    return made


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workers", [1, 3])
def test_weights_come_first_and_nothing_is_made_twice(run_config, mode, workers):
    schedule = schedule_of(run_config(calibration__token_weights="loss", **MODES[mode]), SHAPE)
    assert len(schedule.units) == len(set(schedule.units))
    made = simulate(schedule, workers)
    once = [call for call in made if not isinstance(call, LoadWeights)]
    assert len(once) == len(set(once))
    assert sum(isinstance(call, Embed) for call in made) == 1
    assert schedule.finished == set(schedule.units)
    last_weight = max(i for i, call in enumerate(made) if isinstance(call, Backward))
    assert all("weights" in call.unit or call.unit in (EMBED, "loss-gradient") for call in made[:last_weight])
    passed = [call for call in made[last_weight:] if isinstance(call, ForwardChunk) and call.stream == "original"]
    assert all(call.chunk == "h0000" for call in passed)  # what the waves left is used


@pytest.mark.parametrize("kind", ["norm", "none"])
def test_other_weights_need_no_waves(run_config, kind):
    schedule = schedule_of(run_config(calibration__token_weights=kind), SHAPE)
    assert weights_unit(0) not in schedule.units
    simulate(schedule, 2)


def test_blocks_that_are_finished_are_not_weighed_again(run_config):
    config = run_config(calibration__token_weights="loss")
    finished = {EMBED, "round-0-block-0000", "round-0-block-0002"}
    embedded = {"original": {0: set(SHAPE.chunks)}, "round-0": {0: set(SHAPE.chunks)}}
    schedule = schedule_of(config, SHAPE, StartingPoint(finished=finished, present=embedded))
    made = simulate(schedule, 2)
    assert {call.block for call in made if isinstance(call, WeighTokens)} == {1, 3}
    done = schedule_of(config, SHAPE, StartingPoint(finished=set(schedule_of(config, SHAPE, NOTHING_DONE).units)))
    assert done.complete


def test_what_the_waves_kept_is_spent_by_the_mode(run_config):
    schedule = schedule_of(run_config(calibration__token_weights="loss"), SHAPE)
    spent = []
    while not schedule.complete:
        for worker, call in list(assign(schedule, range(1))):
            spent += schedule.done(worker, call, None)
    dropped = {s.block for s in spent if isinstance(s, SpentInputs) and s.stream == "original"}
    assert dropped == set(range(5))
