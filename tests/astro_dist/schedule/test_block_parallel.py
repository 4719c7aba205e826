"""Schedules are pure: simulated workers of any number and speed finish every unit in an order that is allowed."""

import random

import pytest

from astro_dist.schedule.block_parallel import BlockSchedule
from astro_dist.schedule.calls import Call, Spent, assign
from astro_dist.schedule.names import unit_names
from astro_dist.schedule.sequential import SequentialSchedule

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
    """Two stages, the second of two groups in one of which β is searched, as a worker says it."""
    parts = [{"weigh": 0, "tile": 3}, {"weigh": 2, "tile": 3}, {"weigh": 0, "tile": 3}]
    if call.method == "give_out":
        return {"groups": [(1, parts[1]), (0, parts[0]), (2, parts[2])]}
    if call.method != "share":
        return {}
    return {"stages": 2, "groups": {1: parts[1], 2: parts[2]} if call.args[1] else {0: parts[0]}}


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
        schedule = BlockSchedule(BLOCKS, 2, CHUNKS, [], {}, rounds)
        simulate_with_losses(num_workers, seed, schedule, losses=12)
        assert schedule.finished == set(schedule.units)
    schedule = SequentialSchedule(BLOCKS, 2, CHUNKS, 2, [], {}, seed % 2 == 0)
    simulate_with_losses(num_workers, seed, schedule, losses=12)
    assert schedule.finished == set(schedule.units)


def test_worker_that_waits_for_two_lost_blocks_takes_the_first_of_them():
    schedule = BlockSchedule(3, 0, CHUNKS, [], {})
    schedule.done(0, schedule.next_call(0), {})
    for worker in (0, 1, 2):
        schedule.done(worker, schedule.next_call(worker), None)
    schedule.failed(0, schedule.next_call(0))
    schedule.failed(1, Call("open_block", (0, 1), "round-0-block-0001"))
    assert schedule.next_call(2).args == (0, 0)


def test_worker_that_waits_for_a_block_in_nobodys_hands_takes_it():
    schedule = BlockSchedule(3, 0, CHUNKS, [], {})
    schedule.done(0, schedule.next_call(0), {})
    for worker in (0, 1, 2):
        schedule.done(worker, schedule.next_call(worker), None)
    lost = schedule.next_call(0)
    assert schedule.next_call(1) is None
    schedule.failed(0, lost)
    assert schedule.next_call(1) is None, "the one at the furthest block gives that up, no other"
    assert schedule.next_call(2).args == (0, 0)


def test_what_is_spent_is_named_once_and_is_not_used_after():
    schedule, spent = BlockSchedule(BLOCKS, 2, CHUNKS, [], {}, 2), []
    while not schedule.complete:
        call = schedule.next_call(0)
        if call.method == "forward":
            r, block, _ = call.args
            assert Spent("inputs", block, ["original", "round-0", "round-1"][r]) not in spent
        spent += schedule.done(0, call, {})
    assert len(spent) == len(set(spent)) == 3 * (BLOCKS + 1) + BLOCKS + 2 * BLOCKS


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
            assert r == 0 or {("solve", r - 1, block), ("write", r - 1, block)} & there
        if call.method in ("solve", "give_out"):
            assert all(("forward", *call.args, chunk) in there for chunk in CHUNKS)
        if call.method == "decide":
            assert ("give_out", *call.args[:2]) in there
        if call.method in ("weigh", "tile"):
            assert ("decide", *call.args[:3]) in there
        if call.method == "tile" and call.args[2] == 1:
            assert all(("weigh", *call.args[:3], number) in there for number in range(2))
        if call.method == "write":
            assert all(("tile", *call.args, stage, tile) in there for stage in range(2) for tile in range(3))
        if call.method == "conclude":
            assert all(("forward", *call.args, chunk) in there for chunk in HELD_OUT)
        assert key not in there, f"{key} was done twice"
        there.add(key)
        if call.method == "open_block":
            there.add((*key, worker))


PARTS = ("open_block", "forward", "give_out", "decide", "weigh", "tile")


@pytest.mark.parametrize("rounds", [1, 2])
def test_every_unit_is_done_once(rounds):
    log = blocks(3, 0, rounds)
    ends = [call.unit for _, call in log if call.method not in PARTS]
    assert sorted(ends) == sorted(unit_names(BLOCKS, 2, rounds, True))


def test_rounds_follow_each_other_without_a_gap():
    order = [call for _, call in blocks(4, 0, rounds=2)]
    assert order.index(opening(1, 0)) < order.index(quantized(order, 0)[-1])


def test_measuring_round_ends_before_the_next_begins():
    order = [call for _, call in blocks(4, 0, rounds=2, measured_first=True)]
    assert order.index(quantized(order, 0)[-1]) < order.index(opening(1, 0))


def opening(r, block):
    return Call("open_block", (r, block), f"round-{r}-block-{block:04d}")


def quantized(calls, r):
    """The calls that end a block in a round, in the order in which they ended."""
    return [call for call in calls if call.method in ("solve", "write") and call.args[0] == r]


@pytest.mark.parametrize("seed", range(5))
def test_workers_that_have_nothing_to_do_solve_a_block_with_its_worker(seed):
    log = blocks(8, seed)
    given_out = {call.args for _, call in log if call.method == "give_out"}
    assert given_out
    assert given_out == {call.args for _, call in log if call.method == "write"}
    assert max(len({w for w, c in log if c.method == "tile" and c.args[:2] == place}) for place in given_out) > 1
    assert not {call.method for _, call in blocks(1, seed)} & {"give_out", "write"}


def test_loss_of_a_part_of_a_solve_costs_that_part_alone():
    schedule = BlockSchedule(1, 0, ["c0000"], ["embed"], {"original": {0: ["c0000"]}})
    for _ in range(2):
        schedule.done(0, schedule.next_call(0), None)
    giving = schedule.next_call(0, 1)
    schedule.done(0, giving, {"groups": [(0, {"weigh": 0, "tile": 2})]})
    schedule.done(0, schedule.next_call(0), None)
    lost, other = schedule.next_call(0), schedule.next_call(1)
    schedule.failed(0, lost)
    schedule.done(1, other, None)
    assert (giving.method, schedule.next_call(1)) == ("give_out", lost)


def test_block_that_was_lost_before_it_was_given_out_begins_anew():
    schedule = BlockSchedule(1, 0, ["c0000"], ["embed"], {"original": {0: ["c0000"]}})
    first = schedule.next_call(0)
    schedule.done(0, first, None)
    schedule.done(0, schedule.next_call(0), None)
    schedule.failed(0, schedule.next_call(0, 1))
    assert schedule.next_call(1) == first


def test_held_out_chunks_pass_through_the_result_without_waiting_for_each_other():
    orders = ([(call.method, *call.args) for _, call in blocks(8, seed)] for seed in range(5))
    assert any(
        order.index(("forward", 1, b + 1, "h0000")) < order.index(("conclude", 1, b))
        for order in orders
        for b in range(BLOCKS - 1)
    )


def test_worker_waits_for_one_block_of_the_result_at_most():
    finished = [*unit_names(3, 0, 1, True)[:4], "head-original"]
    schedule = BlockSchedule(3, 0, CHUNKS, finished, {"round-0": {0: HELD_OUT}})
    assert [schedule.next_call(worker) for worker in range(3)] == [
        Call("open_block", (1, 0), "evaluate-0000"), Call("open_block", (1, 1), "evaluate-0001"), None
    ]  # fmt: skip


def test_blocks_in_flight_are_bounded_by_the_workers():
    opened, solved = 0, 0
    for _, call in blocks(3, 1):
        opened, solved = (
            opened + (call.method == "open_block"),
            solved + (call.method in ("solve", "give_out", "conclude")),
        )
        assert opened - solved <= 3


def test_without_held_out_text_nothing_is_evaluated():
    assert not {call.method for _, call in blocks(2, 0, chunks=["c0000"])} & {"conclude", "head"}


def test_second_worker_opens_the_next_block_while_the_first_is_fed():
    schedule = BlockSchedule(3, 0, CHUNKS, [], {})
    schedule.done(0, schedule.next_call(0), {})
    assert [schedule.next_call(w).args for w in (0, 1, 2)] == [(0, 0), (0, 1), (0, 2)]


def passes(log):
    return [call.args for _, call in log if call.method == "pass_on"]


def there(*indices, chunks=CHUNKS):
    return dict.fromkeys(indices, chunks)


def test_finished_units_are_not_done_again():
    finished = ["embed", "copy-0000", "round-0-block-0000", "round-0-block-0001", "evaluate-0000"]
    log = blocks(2, 0, finished=finished, present={"original": there(2), "round-0": there(1, chunks=HELD_OUT)})
    assert not {call.unit for _, call in log} & set(finished)


def test_lost_outputs_of_finished_blocks_are_passed_on_again_and_nothing_is_solved_again():
    finished = ["embed", "round-0-block-0000", "round-0-block-0001", "evaluate-0000", "evaluate-0001"]
    ours = {"round-0": there(2, chunks=HELD_OUT)}
    log = blocks(1, 0, finished=finished, present={"original": {0: CHUNKS, 1: CHUNKS, 2: CHUNKS[:1]}, **ours})
    assert passes(log) == [("original", 1, chunk) for chunk in CHUNKS[1:]]
    log = blocks(3, 0, finished=finished, present={"original": {2: CHUNKS[:1]}, **ours})
    assert next(call for _, call in log if call.method != "copy").method == "embed"
    assert sorted(passes(log)) == [("original", block, chunk) for block in (0, 1) for chunk in CHUNKS[1:]]
    assert sorted(call.args for call in quantized([call for _, call in log], 0)) == [(0, block) for block in (2, 3, 4)]


def test_lost_chunks_on_their_way_through_the_result_are_made_again():
    log = blocks(1, 0, finished=unit_names(5, 2, 1, True)[:-2], present={"original": there(5)})
    assert passes(log) == [("round-0", block, chunk) for block in range(5) for chunk in HELD_OUT]
    assert not {call.method for _, call in log} & {"solve", "write", "conclude"}


def test_shard_of_an_earlier_round_that_is_gone_is_made_again():
    finished = ["embed", *(f"round-0-block-{b:04d}" for b in range(BLOCKS))]
    written = [unit for unit in finished if unit != "round-0-block-0002"]
    present = {"original": there(0, BLOCKS), "round-0": there(0)}
    log = blocks(1, 0, 2, finished=finished, present=present, written=written)
    solved = [call.args for _, call in log if call.method == "solve"]
    assert [args for args in solved if args[0] == 0] == [(0, 2)]
    assert passes(log) == [("original", block, chunk) for block in (0, 1) for chunk in CHUNKS]
    assert [args for args in solved if args[0] == 1] == [(1, b) for b in range(BLOCKS)]
