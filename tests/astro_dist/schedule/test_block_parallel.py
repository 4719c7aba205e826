"""Schedules are pure: simulated workers of any number and speed finish every unit in an order that is allowed."""

import random

import pytest

from astro_dist.schedule.block_parallel import BlockSchedule
from astro_dist.schedule.calls import (
    AccumulateHessians,
    BatchParts,
    BlockParts,
    CopyTensors,
    Embed,
    EvaluateLoss,
    FinishEvaluation,
    Forward,
    ForwardChunk,
    MergeHessians,
    OpenBlock,
    Reconstruct,
    SolveBlock,
    SolveRows,
    SplitBlock,
    TryBetas,
    WriteBlock,
)
from astro_dist.schedule.names import unit_names
from astro_dist.schedule.schedule import NOTHING_DONE, RunShape, StartingPoint, assign
from astro_dist.schedule.sequential import SequentialSchedule
from astro_dist.schedule.spent import SpentInputs

CHUNKS = ["c0000", "c0001", "h0000", "h0001"]
HELD_OUT = CHUNKS[2:]
BLOCKS = 5


def simulate(num_workers, seed, schedule):
    """Run a schedule with workers that take random times; every call in the order in which it ended."""
    dice, running, log = random.Random(seed), {}, []
    while not schedule.complete:
        running |= dict(assign(schedule, [worker for worker in range(num_workers) if worker not in running]))
        assert running, f"stuck after {log[-3:]}"
        worker = dice.choice(sorted(running))
        call = running.pop(worker)
        log.append((worker, call))
        schedule.done(worker, call, result(call))
    return log


def result(call):
    """Two stages, the second of two batches in one of which β is searched and errors are corrected."""
    parts = [BatchParts(batch, samples, 3, is_corrected=batch == 1) for batch, samples in enumerate((0, 2, 0))]
    if isinstance(call, SplitBlock):
        return BlockParts((parts[1], parts[0], parts[2]))
    if not isinstance(call, AccumulateHessians):
        return None
    return BlockParts(tuple(parts[1:] if call.stage else parts[:1]), num_stages=2)


def simulate_with_losses(num_workers, seed, schedule, losses):
    """As `simulate`, but now and then a worker is lost, and another one joins later or never."""
    dice, running, workers = random.Random(seed), {}, list(range(num_workers))
    newest = num_workers
    while not schedule.complete:
        running |= dict(assign(schedule, [worker for worker in workers if worker not in running]))
        assert running, "stuck"
        worker = dice.choice(sorted(running))
        call = running.pop(worker)
        if losses and dice.random() < 0.15:
            losses -= 1
            # A node may take several workers with it, and what they hold.
            gone = {worker, *(other for other in running if dice.random() < 0.4)}
            schedule.failed(worker, call)
            for other in gone & set(running):
                schedule.failed(other, running.pop(other))
            for other in (other for other in list(workers) if other not in gone and other not in running):
                if dice.random() < 0.3 and schedule.holds(other):
                    gone.add(other)
                    schedule.failed(other, call)
            workers = [other for other in workers if other not in gone]
            while len(workers) == 0 or dice.random() < 0.5:
                workers.append(newest)
                newest += 1
        else:
            schedule.done(worker, call, result(call))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(25))
def test_whichever_workers_are_lost_every_unit_is_finished(num_workers, seed):
    for rounds in (1, 3):
        schedule = BlockSchedule(RunShape(BLOCKS, 2, CHUNKS), rounds=rounds)
        simulate_with_losses(num_workers, seed, schedule, losses=12)
        assert schedule.finished == set(schedule.units)
    schedule = SequentialSchedule(RunShape(BLOCKS, 2, CHUNKS), 2, compensated=seed % 2 == 0)
    simulate_with_losses(num_workers, seed, schedule, losses=12)
    assert schedule.finished == set(schedule.units)


def test_worker_that_waits_for_two_lost_blocks_takes_the_first_of_them():
    schedule = BlockSchedule(RunShape(3, 0, CHUNKS))
    schedule.done(0, schedule.next_call(0), {})
    for worker in (0, 1, 2):
        schedule.done(worker, schedule.next_call(worker), None)
    schedule.failed(0, schedule.next_call(0))
    schedule.failed(1, OpenBlock(0, 1))
    assert schedule.next_call(2) == OpenBlock(0, 0)


def test_worker_that_waits_for_a_block_in_nobodys_hands_takes_it():
    schedule = BlockSchedule(RunShape(3, 0, CHUNKS))
    schedule.done(0, schedule.next_call(0), {})
    for worker in (0, 1, 2):
        schedule.done(worker, schedule.next_call(worker), None)
    lost = schedule.next_call(0)
    assert schedule.next_call(1) is None
    schedule.failed(0, lost)
    assert schedule.next_call(1) is None, "the one at the furthest block gives that up, no other"
    assert schedule.next_call(2) == OpenBlock(0, 0)


def test_what_is_spent_is_named_once_and_is_not_used_after():
    schedule, spent = BlockSchedule(RunShape(BLOCKS, 2, CHUNKS), rounds=2), []
    while not schedule.complete:
        call = schedule.next_call(0)
        if isinstance(call, Forward):
            assert SpentInputs(call.block, ["original", "round-0", "round-1"][call.round_index]) not in spent
        spent += schedule.done(0, call, {})
    assert len(spent) == len(set(spent)) == 3 * (BLOCKS + 1) + BLOCKS + 2 * BLOCKS


def blocks(num_workers, seed, rounds=1, chunks=CHUNKS, start=NOTHING_DONE, **options):
    return simulate(num_workers, seed, BlockSchedule(RunShape(BLOCKS, 2, chunks), start, rounds, **options))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 16])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_inputs_are_always_there_before_they_are_used(num_workers, rounds, seed):
    there = set()
    for worker, call in blocks(num_workers, seed, rounds):
        match call:
            case Forward(r, block, chunk, evaluates):
                assert (Forward(r, block - 1, chunk, evaluates) if block else Embed()) in there
                assert (OpenBlock(r, block, evaluates), worker) in there
                assert r == 0 or {SolveBlock(r - 1, block), WriteBlock(r - 1, block)} & there
            case SolveBlock() | SplitBlock():
                assert all(Forward(*call.place, chunk) in there for chunk in CHUNKS)
            case MergeHessians():
                assert SplitBlock(*call.place) in there
            case TryBetas():
                assert MergeHessians(*call.place, call.batch) in there
            case SolveRows():
                assert MergeHessians(*call.place, call.batch) in there
                samples = {TryBetas(*call.place, 1, tile) for tile in range(2)}
                assert call.batch != 1 or samples <= there
            case Reconstruct():
                assert {SolveRows(*call.place, call.batch, tile) for tile in range(3)} <= there
            case WriteBlock():
                assert Reconstruct(*call.place, 1) in there
                assert {SolveRows(*call.place, batch, tile) for batch in range(3) for tile in range(3)} <= there
            case FinishEvaluation():
                assert all(Forward(*call.place, chunk, evaluates=True) in there for chunk in HELD_OUT)
        assert call not in there, f"{call} was done twice"
        there |= {call, (call, worker)}


PARTS = OpenBlock | Forward | SplitBlock | MergeHessians | TryBetas | SolveRows | Reconstruct


@pytest.mark.parametrize("rounds", [1, 2])
def test_every_unit_is_done_once(rounds):
    log = blocks(3, 0, rounds)
    ends = [call.unit for _, call in log if not isinstance(call, PARTS)]
    assert sorted(ends) == sorted(unit_names(BLOCKS, 2, rounds, True))


def test_rounds_follow_each_other_without_a_gap():
    order = [call for _, call in blocks(4, 0, rounds=2)]
    assert order.index(OpenBlock(1, 0)) < order.index(quantized(order, 0)[-1])


def test_measuring_round_ends_before_the_next_begins():
    order = [call for _, call in blocks(4, 0, rounds=2, measured_first=True)]
    assert order.index(quantized(order, 0)[-1]) < order.index(OpenBlock(1, 0))


def quantized(calls, r):
    """The calls that end a block in a round, in the order in which they ended."""
    return [call for call in calls if isinstance(call, SolveBlock | WriteBlock) and call.round_index == r]


@pytest.mark.parametrize("seed", range(5))
def test_workers_that_have_nothing_to_do_solve_a_block_with_its_worker(seed):
    log = blocks(8, seed)
    split = {call.place for _, call in log if isinstance(call, SplitBlock)}
    assert split
    assert split == {call.place for _, call in log if isinstance(call, WriteBlock)}
    solvers = {place: {w for w, c in log if isinstance(c, SolveRows) and c.place == place} for place in split}
    assert max(map(len, solvers.values())) > 1
    assert not any(isinstance(call, SplitBlock | WriteBlock) for _, call in blocks(1, seed))


def test_loss_of_a_part_of_a_solve_costs_that_part_alone():
    schedule = BlockSchedule(RunShape(1, 0, ["c0000"]), StartingPoint(["embed"], {"original": {0: ["c0000"]}}))
    for _ in range(2):
        schedule.done(0, schedule.next_call(0), None)
    splitting = schedule.next_call(0, 1)
    schedule.done(0, splitting, BlockParts((BatchParts(0, 0, 2),)))
    schedule.done(0, schedule.next_call(0), None)
    lost, other = schedule.next_call(0), schedule.next_call(1)
    schedule.failed(0, lost)
    schedule.done(1, other, None)
    assert (splitting, schedule.next_call(1)) == (SplitBlock(0, 0), lost)


def test_block_that_was_lost_before_it_was_split_begins_anew():
    schedule = BlockSchedule(RunShape(1, 0, ["c0000"]), StartingPoint(["embed"], {"original": {0: ["c0000"]}}))
    first = schedule.next_call(0)
    schedule.done(0, first, None)
    schedule.done(0, schedule.next_call(0), None)
    schedule.failed(0, schedule.next_call(0, 1))
    assert schedule.next_call(1) == first


def test_held_out_chunks_pass_through_the_result_without_waiting_for_each_other():
    orders = ([call for _, call in blocks(8, seed)] for seed in range(5))
    assert any(
        order.index(Forward(1, b + 1, "h0000", evaluates=True)) < order.index(FinishEvaluation(1, b))
        for order in orders
        for b in range(BLOCKS - 1)
    )


def test_worker_waits_for_one_block_of_the_result_at_most():
    finished = [*unit_names(3, 0, 1, True)[:4], "head-original"]
    schedule = BlockSchedule(
        RunShape(3, 0, CHUNKS), StartingPoint(finished, {"round-0": {0: HELD_OUT}, "original": {3: HELD_OUT}})
    )
    assert [schedule.next_call(worker) for worker in range(3)] == [
        OpenBlock(1, 0, evaluates=True), OpenBlock(1, 1, evaluates=True), None
    ]  # fmt: skip


def test_blocks_in_flight_are_bounded_by_the_workers():
    opened, solved = 0, 0
    for _, call in blocks(3, 1):
        opened, solved = (
            opened + isinstance(call, OpenBlock),
            solved + isinstance(call, SolveBlock | SplitBlock | FinishEvaluation),
        )
        assert opened - solved <= 3


def test_without_held_out_text_nothing_is_evaluated():
    assert not any(isinstance(c, FinishEvaluation | EvaluateLoss) for _, c in blocks(2, 0, chunks=["c0000"]))


def test_second_worker_opens_the_next_block_while_the_first_is_fed():
    schedule = BlockSchedule(RunShape(3, 0, CHUNKS))
    schedule.done(0, schedule.next_call(0), {})
    assert [schedule.next_call(w) for w in (0, 1, 2)] == [OpenBlock(0, block) for block in range(3)]


def passes(log):
    return [(call.stream, call.block, call.chunk) for _, call in log if isinstance(call, ForwardChunk)]


def there(*indices, chunks=CHUNKS):
    return dict.fromkeys(indices, chunks)


def test_finished_units_are_not_done_again():
    finished = ["embed", "copy-0000", "round-0-block-0000", "round-0-block-0001", "evaluate-0000"]
    log = blocks(2, 0, start=StartingPoint(finished, {"original": there(2), "round-0": there(1, chunks=HELD_OUT)}))
    assert not {call.unit for _, call in log} & set(finished)


def test_lost_outputs_of_finished_blocks_are_passed_on_again_and_nothing_is_solved_again():
    finished = ["embed", "round-0-block-0000", "round-0-block-0001", "evaluate-0000", "evaluate-0001"]
    ours = {"round-0": there(2, chunks=HELD_OUT)}
    log = blocks(1, 0, start=StartingPoint(finished, {"original": {0: CHUNKS, 1: CHUNKS, 2: CHUNKS[:1]}, **ours}))
    assert passes(log) == [("original", 1, chunk) for chunk in CHUNKS[1:]]
    log = blocks(3, 0, start=StartingPoint(finished, {"original": {2: CHUNKS[:1]}, **ours}))
    assert next(call for _, call in log if not isinstance(call, CopyTensors)) == Embed()
    assert sorted(passes(log)) == [("original", block, chunk) for block in (0, 1) for chunk in CHUNKS[1:]]
    assert sorted(call.place for call in quantized([call for _, call in log], 0)) == [(0, block) for block in (2, 3, 4)]


def test_lost_chunks_on_their_way_through_the_result_are_made_again():
    log = blocks(1, 0, start=StartingPoint(unit_names(5, 2, 1, True)[:-2], {"original": there(5)}))
    assert passes(log) == [("round-0", block, chunk) for block in range(5) for chunk in HELD_OUT]
    assert not any(isinstance(call, SolveBlock | WriteBlock | FinishEvaluation) for _, call in log)


def test_shard_of_an_earlier_round_that_is_gone_is_made_again():
    finished = ["embed", *(f"round-0-block-{b:04d}" for b in range(BLOCKS))]
    written = [unit for unit in finished if unit != "round-0-block-0002"]
    present = {"original": there(0, BLOCKS), "round-0": there(0)}
    log = blocks(1, 0, 2, start=StartingPoint(finished, present, written))
    solved = [call.place for _, call in log if isinstance(call, SolveBlock)]
    assert [place for place in solved if place[0] == 0] == [(0, 2)]
    assert passes(log) == [("original", block, chunk) for block in (0, 1) for chunk in CHUNKS]
    assert [place for place in solved if place[0] == 1] == [(1, b) for b in range(BLOCKS)]
