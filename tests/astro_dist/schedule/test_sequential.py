"""Mode `sequential`: shares, tiles, shard and passing on come in the only order that is allowed."""

import random

import pytest

from astro_dist.schedule.names import sequential_units
from astro_dist.schedule.sequential import SequentialSchedule, shares
from tests.astro_dist.schedule.test_block_parallel import simulate

CHUNKS = ["c0000", "c0001", "c0002", "h0000"]
BLOCKS = 4


def run(num_workers, seed, finished=(), present=None, chunks=CHUNKS, compensated=False):
    schedule = SequentialSchedule(BLOCKS, 2, chunks, 2, finished, present or {}, compensated)
    return simulate(num_workers, seed, schedule)


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_used_before_it_is_there(num_workers, seed, compensated):
    seen = []
    for _, call in run(num_workers, seed, compensated=compensated):
        key = (call.method, *call.args)
        if call.method == "share":
            block, stage, number = call.args
            chunks = shares(CHUNKS, 2)[number]
            assert block == 0 or all(("pass_on", "round-0", block - 1, c) in seen for c in chunks)
            assert stage == 0 or all(("tile", 0, block, stage - 1, i) in seen for i in range(3))
            assert not compensated or block == 0 or all(("pass_on", "original", block - 1, c) in seen for c in chunks)
        if call.method == "decide":
            assert all(("share", call.args[1], min(call.args[2], 1), i) in seen for i in range(2))
        if call.method in ("weigh", "tile"):
            assert ("decide", *call.args[:3]) in seen
        if call.method == "tile" and call.args[2] == 1:
            assert all(("weigh", *call.args[:3], i) in seen for i in range(2))
        if call.method == "write":
            assert all(("tile", *call.args, group, i) in seen for group in range(3) for i in range(3))
        if call.method == "pass_on" and call.args[0] == "round-0":
            assert ("write", 0, call.args[1]) in seen
        assert key not in seen
        seen.append(key)
    assert seen.count(("head", "round-0")) == seen.count(("head", "original")) == 1
    assert sum(key[0] == "write" for key in seen) == BLOCKS


def test_only_held_out_chunks_leave_the_last_block_or_pass_through_the_source():
    calls = [call.args for _, call in run(2, 0) if call.method == "pass_on"]
    assert {args[2] for args in calls if args[1] == BLOCKS - 1 or args[0] == "original"} == {"h0000"}


def test_all_workers_share_a_block():
    log = run(3, 1)
    assert len({worker for worker, call in log if call.method == "share" and call.args[0] == 2}) >= 2
    assert len({worker for worker, call in log if call.method == "tile" and call.args[1] == 2}) == 3


@pytest.mark.parametrize("compensated", [False, True])
def test_going_on_repeats_no_pass(compensated):
    finished = ["embed", "copy-0000", "copy-0001", "round-0-block-0000", "round-0-block-0001"]
    # The inputs of the first block are never dropped.
    present = {"round-0": {0: CHUNKS, 1: CHUNKS, 2: CHUNKS[:1]}, "original": {0: CHUNKS, 2: [*CHUNKS[:2], "h0000"]}}
    log = [(c.method, *c.args) for _, c in run(1, 0, finished, present, compensated=compensated)]
    passes = [args for method, *args in log if method == "pass_on"]
    assert [args for args in passes if args[0] == "round-0" and args[1] < 2] == [["round-0", 1, c] for c in CHUNKS[1:]]
    again = [["original", 0, "c0002"], ["original", 1, "c0002"]] if compensated else []
    assert [args for args in passes if args[0] == "original" and args[1] < 2] == again
    assert ("share", 2, 1, 0) in log
    assert ("share", 1, 0, 0) not in log


def test_damaged_shard_is_redone_alone():
    finished = [unit for unit in sequential_units(BLOCKS, 2, True) if unit != "round-0-block-0002"]
    log = [(c.method, *c.args) for _, c in run(1, 0, finished, {s: {0: CHUNKS} for s in ("round-0", "original")})]
    assert [args for method, *args in log if method == "write"] == [[0, 2]]
    assert not {method for method, *_ in log} & {"embed", "head"}


def test_run_that_is_finished_has_nothing_to_do():
    assert not run(1, 0, sequential_units(BLOCKS, 2, True), {})


def test_held_out_chunks_that_are_lost_on_the_way_through_the_source_begin_anew():
    finished = ["embed", "round-0-block-0000"]
    log = [(call.method, *call.args) for _, call in run(1, 0, finished, {"round-0": {0: CHUNKS, 1: CHUNKS}})]
    assert log[0] == ("embed",)
    assert ("pass_on", "original", 0, "h0000") in log


@pytest.mark.parametrize(("count", "expected"), [(1, [3]), (2, [1, 2]), (3, [1, 1, 1]), (9, [1, 1, 1])])
def test_shares_are_contiguous_and_whole(count, expected):
    found = shares(CHUNKS, count)
    assert [len(part) for part in found] == expected
    assert [chunk for part in found for chunk in part] == CHUNKS[:3]


def test_without_held_out_text_there_is_no_head():
    assert not {call.method for _, call in run(2, 0, chunks=CHUNKS[:3])} & {"head"}


@pytest.mark.parametrize("lost", CHUNKS)
def test_chunk_that_is_lost_where_the_current_block_wants_it_is_passed_on_again(lost):
    """It was passed on to the next block before, which does not help."""
    finished = ["embed", "round-0-block-0000", "round-0-block-0001"]
    whole = dict.fromkeys(range(4), CHUNKS)
    there = {**whole, 2: [chunk for chunk in CHUNKS if chunk != lost]}
    log = [
        (c.method, *c.args)
        for _, c in run(1, 0, finished, {"round-0": {0: CHUNKS, 2: CHUNKS}, "original": there}, compensated=True)
    ]
    needed = not lost.startswith("h")
    assert (("pass_on", "original", 1, lost) in log) == needed
    assert ("write", 0, 3) in log


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("compensated", [False, True])
def test_run_goes_on_whatever_chunks_are_left(seed, compensated):
    dice = random.Random(seed)
    units = sequential_units(BLOCKS, 2, True)
    finished = [unit for unit in units[: dice.randrange(len(units))] if dice.random() < 0.9]
    present = {
        stream: {block: [chunk for chunk in CHUNKS if dice.random() < 0.6] for block in range(BLOCKS + 1)}
        for stream in ("original", "round-0")
    }
    present["original"][0] = present["round-0"][0]
    run(2, seed, finished, present, compensated=compensated)
