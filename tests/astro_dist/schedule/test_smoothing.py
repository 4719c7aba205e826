"""The wave that measures channels: its order, several workers, lost workers and files."""

import pytest

from astro_dist.schedule.calls import Embed, ForwardChunk, MeasureChannels, SmoothChannels
from astro_dist.schedule.names import CHANNELS, ORIGINAL, smoothing_unit
from astro_dist.schedule.schedule import NOTHING_DONE, RunShape, StartingPoint, assign
from astro_dist.schedule.smoothing import SmoothingSchedule
from astro_dist.schedule.spent import SpentInputs

CHUNKS = ("c0000", "c0001", "c0002", "h0000")
CALIBRATION = CHUNKS[:3]
SHAPE = RunShape(4, 1, CHUNKS)


def run(schedule, workers=1, fails=()):
    """Give out calls and let the oldest return, until nothing is left; the calls in the order in which they return."""
    log, at_work, fails = [], {}, set(fails)
    while not schedule.complete:
        free = [worker for worker in range(workers) if worker not in at_work]
        at_work |= dict(assign(schedule, free))
        assert at_work, "every worker waits"
        worker = next(iter(at_work))
        call = at_work.pop(worker)
        if len(log) in fails:
            fails.discard(len(log))
            schedule.failed(worker, call)
            continue
        log.append((worker, call))
        schedule.done(worker, call, None)
    return log


def test_chunks_pass_block_after_block_and_each_block_is_decided():
    calls = [call for _, call in run(SmoothingSchedule(SHAPE))]
    assert calls[0] == Embed()
    for block in range(4):
        measured = [calls.index(MeasureChannels(block, chunk)) for chunk in CALIBRATION]
        assert max(measured) < calls.index(SmoothChannels(block))
    assert len(calls) == 1 + 4 * 3 + 4, "held-out chunks stay where they are"


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_workers_share_the_wave(workers):
    log = run(SmoothingSchedule(SHAPE), workers)
    assert len({worker for worker, _ in log}) > 1
    assert len({call for _, call in log}) == len(log) == 17


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("number", range(0, 14, 3))
def test_lost_worker_does_not_stop_the_wave(workers, number):
    log = run(SmoothingSchedule(SHAPE), workers, fails=[number])
    assert {call for _, call in log} == {call for _, call in run(SmoothingSchedule(SHAPE))}


def test_what_is_measured_is_spent_once_a_block_is_decided():
    schedule = SmoothingSchedule(SHAPE)
    for call in (Embed(), *(MeasureChannels(0, chunk) for chunk in CALIBRATION)):
        assert schedule.done(0, call, None) == []
    assert schedule.done(0, SmoothChannels(0), None) == [SpentInputs(1, CHANNELS)]


@pytest.mark.parametrize("keeps_last", [False, True])
def test_inputs_of_all_blocks_are_left_for_what_follows(keeps_last):
    schedule = SmoothingSchedule(SHAPE, NOTHING_DONE, keeps_last)
    run(schedule)
    assert {block: sorted(chunks) for block, chunks in schedule.inputs.items()} == {
        0: list(CHUNKS), **{block: list(CALIBRATION) for block in range(1, 4 + keeps_last)},
    }  # fmt: skip


def test_run_goes_on_with_what_is_there():
    present = {
        ORIGINAL: {0: CHUNKS, 1: CALIBRATION, 2: CALIBRATION[:1]},
        CHANNELS: {1: CALIBRATION, 2: CALIBRATION[:1]},
    }
    schedule = SmoothingSchedule(SHAPE, StartingPoint({"embed", smoothing_unit(0)}, present))
    calls = [call for _, call in run(schedule)]
    assert calls[0] == MeasureChannels(1, CALIBRATION[1])
    assert len(calls) == 2 + 3 + 3 + 3


def test_lost_inputs_are_made_again_from_what_is_there():
    finished = {"embed", *(smoothing_unit(block) for block in (0, 1))}
    schedule = SmoothingSchedule(SHAPE, StartingPoint(finished, {ORIGINAL: {0: CHUNKS}, CHANNELS: {3: CALIBRATION}}))
    calls = [call for _, call in run(schedule)]
    assert calls[0] == ForwardChunk(ORIGINAL, 0, CALIBRATION[0], smoothing_unit(0))
    assert MeasureChannels(2, CALIBRATION[0]) in calls, "what is decided is tried on the first chunk"
    again = SmoothingSchedule(SHAPE, StartingPoint(finished, {}))
    assert next(call for _, call in run(again)) == Embed()
