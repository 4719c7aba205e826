"""Workers are told which block they will probably open next, so that they read it while they solve."""

import pytest

from astro_dist.schedule.block_parallel import BlockSchedule
from astro_dist.schedule.calls import BatchParts, BlockParts, OpenBlock, SolveBlock, SplitBlock
from astro_dist.schedule.foretold_blocks import ForetoldBlocks
from astro_dist.schedule.schedule import RunShape, assign


def test_workers_that_solve_take_waiting_blocks_in_their_order():
    foretold = ForetoldBlocks()
    assert foretold.foretell(0, [3, 4, 5]) == 3
    assert foretold.foretell(1, [3, 4, 5]) == 4
    assert foretold.take(0) == 3
    assert foretold.foretell(2, [4, 5]) == 5
    assert foretold.foretell(3, [4, 5]) is None, "none is left for it"
    assert foretold.take(3) is None
    assert foretold.take(0) is None, "it is told once"


def openings(num_workers, num_blocks=12):
    """Every call that opens a block or solves one, of workers that each take the same time for a call."""
    schedule, log, running = BlockSchedule(RunShape(num_blocks, 0, ["c0000", "c0001"])), [], []
    free = list(range(num_workers))
    while not schedule.complete:
        for worker, call in list(assign(schedule, free)):
            running.append((worker, call))
            free.remove(worker)
        worker, call = running.pop(0)
        if isinstance(call, OpenBlock | SolveBlock):
            log.append(call)
        schedule.done(worker, call, BlockParts((BatchParts(0, 0, 1),)) if isinstance(call, SplitBlock) else None)
        free.append(worker)
    return log


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_what_is_foretold_comes_true(num_workers):
    log = openings(num_workers)
    opened = [call for call in log if isinstance(call, OpenBlock)]
    told = {call.following for call in log if isinstance(call, SolveBlock)} - {None}
    assert {call.block for call in opened if call.was_foretold} <= told
    assert sum(call.was_foretold for call in opened) == 12 - num_workers


def test_what_is_foretold_makes_no_other_call():
    assert SolveBlock(0, 1, following=2) == SolveBlock(0, 1)
    assert hash(OpenBlock(0, 1, was_foretold=True)) == hash(OpenBlock(0, 1))


def test_a_lost_worker_was_told_in_vain():
    schedule = BlockSchedule(RunShape(4, 0, ["c0000"]))
    calls = []
    while not calls or not isinstance(calls[-1], SolveBlock):
        calls.append(schedule.next_call(0))
        if not isinstance(calls[-1], SolveBlock):
            schedule.done(0, calls[-1], None)
    assert calls[-1].following == 1
    schedule.failed(0, calls[-1])
    again = schedule.next_call(0)
    assert again == OpenBlock(0, 0)
    assert not again.was_foretold
