"""Mode `sequential`: shares, tiles, shard and passing on come in the only order that is allowed."""

import random

import pytest

from astro_dist.schedule.calls import (
    AccumulateHessians,
    Embed,
    EvaluateLoss,
    ForwardChunk,
    MergeHessians,
    Reconstruct,
    SolveRows,
    TryBetas,
    WriteBlock,
)
from astro_dist.schedule.names import sequential_units
from astro_dist.schedule.schedule import RunShape, StartingPoint
from astro_dist.schedule.sequential import SequentialSchedule, shares
from tests.astro_dist.schedule.test_block_parallel import simulate

CHUNKS = ["c0000", "c0001", "c0002", "h0000"]
BLOCKS = 4


def run(num_workers, seed, finished=(), present=None, chunks=CHUNKS, compensated=False):
    schedule = SequentialSchedule(RunShape(BLOCKS, 2, chunks), 2, StartingPoint(finished, present or {}), compensated)
    return simulate(num_workers, seed, schedule)


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_used_before_it_is_there(num_workers, seed, compensated):
    seen = []
    for _, call in run(num_workers, seed, compensated=compensated):
        match call:
            case AccumulateHessians(block, stage, share):
                chunks = shares(CHUNKS, 2)[share]
                assert block == 0 or passed("round-0", block - 1, chunks) <= set(seen)
                assert stage == 0 or {SolveRows(0, block, stage - 1, tile) for tile in range(3)} <= set(seen)
                assert not compensated or block == 0 or passed("original", block - 1, chunks) <= set(seen)
            case MergeHessians(_, block, batch):
                assert {AccumulateHessians(block, min(batch, 1), share) for share in range(2)} <= set(seen)
            case TryBetas():
                assert MergeHessians(*call.place, call.batch) in seen
            case SolveRows():
                assert MergeHessians(*call.place, call.batch) in seen
                assert call.batch != 1 or {TryBetas(*call.place, 1, tile) for tile in range(2)} <= set(seen)
            case Reconstruct():
                assert {SolveRows(*call.place, call.batch, tile) for tile in range(3)} <= set(seen)
            case WriteBlock():
                assert Reconstruct(*call.place, 1) in seen
                assert {SolveRows(*call.place, batch, tile) for batch in range(3) for tile in range(3)} <= set(seen)
            case ForwardChunk("round-0", block):
                assert WriteBlock(0, block) in seen
        assert call not in seen
        seen.append(call)
    assert seen.count(EvaluateLoss("round-0")) == seen.count(EvaluateLoss("original")) == 1
    assert sum(isinstance(call, WriteBlock) for call in seen) == BLOCKS


def passed(stream, block, chunks):
    """The calls that pass chunks through a block."""
    return {ForwardChunk(stream, block, chunk, f"round-0-block-{block:04d}") for chunk in chunks}


def passes(log):
    return [(call.stream, call.block, call.chunk) for _, call in log if isinstance(call, ForwardChunk)]


def test_only_held_out_chunks_leave_the_last_block_or_pass_through_the_source():
    found = {chunk for stream, block, chunk in passes(run(2, 0)) if block == BLOCKS - 1 or stream == "original"}
    assert found == {"h0000"}


def test_all_workers_share_a_block():
    log = run(3, 1)
    assert len({worker for worker, call in log if isinstance(call, AccumulateHessians) and call.block == 2}) >= 2
    assert len({worker for worker, call in log if isinstance(call, SolveRows) and call.block == 2}) == 3


@pytest.mark.parametrize("compensated", [False, True])
def test_going_on_repeats_no_pass(compensated):
    finished = ["embed", "copy-0000", "copy-0001", "round-0-block-0000", "round-0-block-0001"]
    # The inputs of the first block are never dropped.
    present = {"round-0": {0: CHUNKS, 1: CHUNKS, 2: CHUNKS[:1]}, "original": {0: CHUNKS, 2: [*CHUNKS[:2], "h0000"]}}
    log = run(1, 0, finished, present, compensated=compensated)
    calls = [call for _, call in log]
    assert [p for p in passes(log) if p[0] == "round-0" and p[1] < 2] == [("round-0", 1, c) for c in CHUNKS[1:]]
    again = [("original", 0, "c0002"), ("original", 1, "c0002")] if compensated else []
    assert [p for p in passes(log) if p[0] == "original" and p[1] < 2] == again
    assert AccumulateHessians(2, 1, 0) in calls
    assert AccumulateHessians(1, 0, 0) not in calls


def test_damaged_shard_is_redone_alone():
    finished = [unit for unit in sequential_units(BLOCKS, 2, True) if unit != "round-0-block-0002"]
    calls = [c for _, c in run(1, 0, finished, {s: {0: CHUNKS} for s in ("round-0", "original")})]
    assert [c for c in calls if isinstance(c, WriteBlock)] == [WriteBlock(0, 2)]
    assert not any(isinstance(c, Embed | EvaluateLoss) for c in calls)


def test_run_that_is_finished_has_nothing_to_do():
    assert not run(1, 0, sequential_units(BLOCKS, 2, True), {})


def test_held_out_chunks_that_are_lost_on_the_way_through_the_source_begin_anew():
    finished = ["embed", "round-0-block-0000"]
    log = run(1, 0, finished, {"round-0": {0: CHUNKS, 1: CHUNKS}})
    assert log[0][1] == Embed()
    assert ("original", 0, "h0000") in passes(log)


@pytest.mark.parametrize(("count", "expected"), [(1, [3]), (2, [1, 2]), (3, [1, 1, 1]), (9, [1, 1, 1])])
def test_shares_are_contiguous_and_whole(count, expected):
    found = shares(CHUNKS, count)
    assert [len(part) for part in found] == expected
    assert [chunk for part in found for chunk in part] == CHUNKS[:3]


def test_without_held_out_text_there_is_no_head():
    assert not any(isinstance(call, EvaluateLoss) for _, call in run(2, 0, chunks=CHUNKS[:3]))


@pytest.mark.parametrize("lost", CHUNKS)
def test_chunk_that_is_lost_where_the_current_block_wants_it_is_passed_on_again(lost):
    """It was passed on to the next block before, which does not help."""
    finished = ["embed", "round-0-block-0000", "round-0-block-0001"]
    whole = dict.fromkeys(range(4), CHUNKS)
    there = {**whole, 2: [chunk for chunk in CHUNKS if chunk != lost]}
    log = run(1, 0, finished, {"round-0": {0: CHUNKS, 2: CHUNKS}, "original": there}, compensated=True)
    needed = not lost.startswith("h")
    assert (("original", 1, lost) in passes(log)) == needed
    assert WriteBlock(0, 3) in [call for _, call in log]


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
