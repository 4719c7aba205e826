"""The schedule is pure: simulated workers of any number and speed finish every unit in an order that is allowed."""

import random

import pytest

from astro_dist.schedule import Schedule, unit_names

CHUNKS = ["c0000", "c0001", "h0000"]


def simulate(num_workers, seed, num_blocks=5, chunks=CHUNKS, finished=(), present=None, present_quantized=None):
    """Run a schedule with workers that take random times; every call in the order in which it ended."""
    schedule = Schedule(num_blocks, 2, chunks, finished, present or {}, present_quantized or {})
    dice, running, log = random.Random(seed), {}, []
    while not schedule.complete:
        for worker in range(num_workers):
            call = schedule.next_call(worker) if worker not in running else None
            if call:
                running[worker] = call
        assert running, f"stuck after {log[-3:]}"
        worker = dice.choice(sorted(running))
        log.append((worker, running[worker]))
        schedule.done(worker, running.pop(worker))
    return schedule, log


@pytest.mark.parametrize("num_workers", [1, 2, 3, 16])
@pytest.mark.parametrize("seed", range(5))
def test_inputs_are_always_there_before_they_are_used(num_workers, seed):
    _, log = simulate(num_workers, seed)
    there = set()
    for worker, call in log:
        key = (call.method, *call.args)
        if call.method == "forward":
            block, chunk = call.args
            assert ("embed",) in there if block == 0 else ("forward", block - 1, chunk) in there
            assert ("open_block", block, worker) in there
        if call.method == "solve":
            assert all(("forward", *call.args, chunk) in there for chunk in CHUNKS)
        if call.method == "advance":
            assert ("solve", *call.args) in there
            assert call.args == (0,) or ("advance", call.args[0] - 1) in there
        assert key not in there, f"{key} was done twice"
        there.add(key)
        if call.method == "open_block":
            there.add((*key, worker))


def test_every_unit_is_done_once():
    schedule, log = simulate(3, 0)
    ends = [call.unit for _, call in log if call.method not in ("open_block", "forward")]
    assert sorted(ends) == sorted(unit_names(5, 2, True))
    assert schedule.total == len(ends)


def test_blocks_in_flight_are_bounded_by_the_workers():
    _, log = simulate(3, 1, num_blocks=12)
    opened, solved = 0, 0
    for _, call in log:
        opened, solved = opened + (call.method == "open_block"), solved + (call.method == "solve")
        assert opened - solved <= 3


def test_without_held_out_text_nothing_is_evaluated():
    _, log = simulate(2, 0, chunks=["c0000"])
    assert not {call.method for _, call in log} & {"advance", "head"}


def test_second_worker_opens_the_next_block_while_the_first_is_fed():
    schedule = Schedule(3, 0, CHUNKS, [], {}, {})
    schedule.done(0, schedule.next_call(0))
    assert [schedule.next_call(w).args for w in (0, 1)] == [(0,), (1,)]
    assert schedule.next_call(2).args == (2,)


def full(blocks):
    return dict.fromkeys(blocks, CHUNKS)


def test_finished_units_are_not_done_again():
    finished = ["embed", "copy-0000", "block-0000", "block-0001", "quantized-0000"]
    _, log = simulate(2, 0, finished=finished, present=full([2]), present_quantized={1: ["h0000"]})
    assert not {call.unit for _, call in log} & set(finished)


def test_block_whose_outputs_are_gone_is_done_again_and_so_is_what_it_needs():
    finished = ["embed", "block-0000", "block-0001", "quantized-0000", "quantized-0001"]
    present = {0: CHUNKS, 1: CHUNKS, 2: CHUNKS[:1]}
    _, log = simulate(1, 0, finished=finished, present=present, present_quantized={2: ["h0000"]})
    assert [call.unit for _, call in log if call.method == "solve"][0] == "block-0001"
    _, log = simulate(1, 0, finished=finished, present={2: CHUNKS[:1]}, present_quantized={2: ["h0000"]})
    assert [call.unit for _, call in log if call.method in ("embed", "solve")][:2] == ["embed", "block-0000"]


def test_lost_quantized_chunks_are_made_again():
    finished = unit_names(5, 2, True)[:-2]
    _, log = simulate(1, 0, finished=finished, present=full([5]))
    assert [call.unit for _, call in log if call.method == "advance"] == [f"quantized-{i:04d}" for i in range(5)]
