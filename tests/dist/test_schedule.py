"""Schedules are pure: simulated workers of any number and speed finish every unit in an order that is allowed."""

import random

import pytest

from astro_dist.schedule import BlockSchedule, unit_names

CHUNKS = ["c0000", "c0001", "h0000"]
BLOCKS = 5


def simulate(num_workers, seed, schedule):
    """Run a schedule with workers that take random times; every call in the order in which it ended."""
    dice, running, log = random.Random(seed), {}, []
    while not schedule.complete:
        for worker in range(num_workers):
            call = schedule.next_call(worker) if worker not in running else None
            if call:
                running[worker] = call
        assert running, f"stuck after {log[-3:]}"
        worker = dice.choice(sorted(running))
        call = running.pop(worker)
        log.append((worker, call))
        schedule.done(worker, call, {"tiles": 3, "stages": 2})
    return log


def blocks(num_workers, seed, rounds=1, chunks=CHUNKS, finished=(), present=None, **options):
    return simulate(num_workers, seed, BlockSchedule(BLOCKS, 2, chunks, finished, present or {}, rounds, **options))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 16])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_inputs_are_always_there_before_they_are_used(num_workers, rounds, seed):
    there = set()
    for worker, call in blocks(num_workers, seed, rounds):
        key = (call.method, *call.args)
        if call.method == "forward":
            r, block, chunk = call.args
            assert ("embed",) in there if block == 0 else ("forward", r, block - 1, chunk) in there
            assert ("open_block", r, block, worker) in there
            assert r == 0 or ("solve", r - 1, block) in there
        if call.method == "solve":
            assert all(("forward", *call.args, chunk) in there for chunk in CHUNKS)
        if call.method == "advance":
            assert ("solve", rounds - 1, *call.args) in there
            assert call.args == (0,) or ("advance", call.args[0] - 1) in there
        assert key not in there, f"{key} was done twice"
        there.add(key)
        if call.method == "open_block":
            there.add((*key, worker))


@pytest.mark.parametrize("rounds", [1, 2])
def test_every_unit_is_done_once(rounds):
    log = blocks(3, 0, rounds)
    ends = [call.unit for _, call in log if call.method not in ("open_block", "forward")]
    assert sorted(ends) == sorted(unit_names(BLOCKS, 2, rounds, True))


def test_rounds_follow_each_other_without_a_gap():
    order = [(call.method, *call.args) for _, call in blocks(4, 0, rounds=2)]
    assert order.index(("open_block", 1, 0)) < order.index(("solve", 0, BLOCKS - 1))


def test_measuring_round_ends_before_the_next_begins():
    log = [(c.method, *c.args) for _, c in blocks(4, 0, rounds=2, measured_first=True)]
    assert max(log.index(("solve", 0, b)) for b in range(BLOCKS)) < log.index(("open_block", 1, 0))


def test_blocks_in_flight_are_bounded_by_the_workers():
    opened, solved = 0, 0
    for _, call in blocks(3, 1):
        opened, solved = opened + (call.method == "open_block"), solved + (call.method == "solve")
        assert opened - solved <= 3


def test_without_held_out_text_nothing_is_evaluated():
    assert not {call.method for _, call in blocks(2, 0, chunks=["c0000"])} & {"advance", "head"}


def test_second_worker_opens_the_next_block_while_the_first_is_fed():
    schedule = BlockSchedule(3, 0, CHUNKS, [], {})
    schedule.done(0, schedule.next_call(0), {})
    assert [schedule.next_call(w).args for w in (0, 1, 2)] == [(0, 0), (0, 1), (0, 2)]


def there(*indices, chunks=CHUNKS):
    return dict.fromkeys(indices, chunks)


def test_finished_units_are_not_done_again():
    finished = ["embed", "copy-0000", "round-0-block-0000", "round-0-block-0001", "evaluate-0000"]
    log = blocks(2, 0, finished=finished, present={"original": there(2), "round-0": there(1, chunks=["h0000"])})
    assert not {call.unit for _, call in log} & set(finished)


def test_block_whose_outputs_are_gone_is_done_again_and_so_is_what_it_needs():
    finished = ["embed", "round-0-block-0000", "round-0-block-0001", "evaluate-0000", "evaluate-0001"]
    ours = {"round-0": there(2, chunks=["h0000"])}
    log = blocks(1, 0, finished=finished, present={"original": {0: CHUNKS, 1: CHUNKS, 2: CHUNKS[:1]}, **ours})
    assert [call.unit for _, call in log if call.method == "solve"][0] == "round-0-block-0001"
    log = blocks(1, 0, finished=finished, present={"original": {2: CHUNKS[:1]}, **ours})
    assert [call.unit for _, call in log if call.method in ("embed", "solve")][:2] == ["embed", "round-0-block-0000"]


def test_lost_result_chunks_are_made_again():
    log = blocks(1, 0, finished=unit_names(5, 2, 1, True)[:-2], present={"original": there(5)})
    assert [call.unit for _, call in log if call.method == "advance"] == [f"evaluate-{i:04d}" for i in range(5)]


def test_shard_of_an_earlier_round_that_is_gone_is_made_again():
    finished = ["embed", *(f"round-0-block-{b:04d}" for b in range(BLOCKS))]
    written = [unit for unit in finished if unit != "round-0-block-0002"]
    present = {"original": there(0, BLOCKS), "round-0": there(0)}
    log = blocks(1, 0, 2, finished=finished, present=present, written=written)
    solved = [call.args for _, call in log if call.method == "solve"]
    assert [args for args in solved if args[0] == 0] == [(0, 0), (0, 1), (0, 2)]
    assert [args for args in solved if args[0] == 1] == [(1, b) for b in range(BLOCKS)]
