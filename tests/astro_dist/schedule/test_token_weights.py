"""The waves that measure token weights, simulated: order, workers, what is lost and made again."""

import itertools
import random

import pytest

from astro.errors import RunError
from astro_dist.execution.failure import Failure, FailureHistory
from astro_dist.schedule.calls import Backward, DifferentiateLoss, Embed, ForwardChunk, LoadWeights, WeighTokens
from astro_dist.schedule.names import EMBED, ENERGY, GRADIENT, ORIGINAL, weights_unit
from astro_dist.schedule.schedule import RunShape, StartingPoint, assign
from astro_dist.schedule.spent import SpentInputs
from astro_dist.schedule.token_weights import TokenWeightSchedule
from astro_dist.schedule.wave_call import WaveCall, tells_following

BLOCKS, CHUNKS = 5, ["c0000", "c0001", "c0002"]
SHAPE = RunShape(BLOCKS, 1, [*CHUNKS, "h0000"])


class Disk:
    """What is on disk: a call whose inputs are missing is a mistake of the schedule."""

    def __init__(self):
        self.files = set()

    def do(self, call):
        needs, makes = self.effect(call)
        assert needs <= self.files, f"{call} lacks {needs - self.files}"
        self.files |= makes

    def effect(self, call):
        match call:
            case LoadWeights():
                return set(), set()
            case Embed():
                return set(), {(ORIGINAL, 0, chunk) for chunk in CHUNKS}
            case ForwardChunk(stream, block, chunk):
                assert stream == ORIGINAL
                return {(ORIGINAL, block, chunk)}, {(ORIGINAL, block + 1, chunk)}
            case DifferentiateLoss(chunk):
                return {(ORIGINAL, BLOCKS, chunk)}, {(GRADIENT, BLOCKS, chunk)}
            case Backward(block, chunk):
                made = {(ENERGY, block + 1, chunk)} | ({(GRADIENT, block, chunk)} if block else set())
                return {(ORIGINAL, block, chunk), (GRADIENT, block + 1, chunk)}, made
            case WeighTokens(block):
                return {(ENERGY, block + 1, chunk) for chunk in CHUNKS}, {("weights", block, "")}

    def drop(self, spent):
        assert isinstance(spent, SpentInputs)
        self.files -= {file for file in self.files if file[:2] == (spent.stream, spent.block)}

    def start(self, finished):
        present = {}
        for stream, block, chunk in self.files:
            present.setdefault(stream, {}).setdefault(block, set()).add(chunk)
        return StartingPoint(finished=finished, present=present)


def simulate(schedule, workers, disk, calls=10**6, fails=()):
    """Run until it is complete, or some calls were made; calls of one turn end in the order of their workers."""
    made = []
    while not schedule.complete and len(made) < calls:
        turn = list(assign(schedule, range(workers)))
        assert turn, "nothing can be done, and nothing is being done"
        for worker, call in turn:
            if len(made) in fails:
                schedule.failed(worker, call)
            else:
                disk.do(call)
                for spent in schedule.done(worker, call, None):
                    disk.drop(spent)
            made.append((worker, call))
    return made


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_every_call_is_made_once_and_nothing_is_left_but_inputs(workers):
    disk = Disk()
    made = [
        call for _, call in simulate(TokenWeightSchedule(SHAPE), workers, disk) if not isinstance(call, LoadWeights)
    ]
    assert len(made) == len(set(made)) == 1 + (2 * BLOCKS + 1) * len(CHUNKS) + BLOCKS
    kinds = {kind for kind, _, _ in disk.files}
    assert kinds == {ORIGINAL, "weights"}
    assert {block for kind, block, _ in disk.files if kind == ORIGINAL} == set(range(BLOCKS + 1))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_stay_with_a_block(workers):
    made = simulate(TokenWeightSchedule(SHAPE), workers, Disk())
    by_worker = {}
    for worker, call in made:
        if isinstance(call, ForwardChunk | Backward):
            by_worker.setdefault(worker, []).append((type(call), call.block))
    visits = [place for places in by_worker.values() for place, _ in itertools.groupby(places)]
    assert set(visits) == {(kind, block) for kind in (ForwardChunk, Backward) for block in range(BLOCKS)}
    assert len(visits) <= 2 * (BLOCKS + workers - 1)  # more only where a worker would have nothing to do


def test_gradient_sets_out_before_all_chunks_have_come_to_the_head():
    made = [call for _, call in simulate(TokenWeightSchedule(SHAPE), 3, Disk())]
    backward = next(i for i, call in enumerate(made) if isinstance(call, Backward))
    assert any(isinstance(call, ForwardChunk | DifferentiateLoss) for call in made[backward:])


@pytest.mark.parametrize("workers", [1, 2, 6])
def test_norm_and_head_are_loaded_by_one_worker_where_few_chunks_wait(workers):
    made = simulate(TokenWeightSchedule(SHAPE), workers, Disk())
    assert sum(call == LoadWeights(None, "loss-gradient") for _, call in made) == 1
    assert len({worker for worker, call in made if isinstance(call, DifferentiateLoss)}) == 1


@pytest.mark.parametrize(("num_chunks", "at_head"), [(7, 1), (8, 2), (23, 3), (60, 5)])
def test_place_is_shared_where_many_chunks_wait(num_chunks, at_head):
    """The first worker goes to the head, the second to the block behind it, and others come to help."""
    chunks = [f"c{number:04d}" for number in range(num_chunks)]
    present = {ORIGINAL: {0: chunks, 1: chunks}}
    schedule = TokenWeightSchedule(RunShape(1, 0, chunks), StartingPoint(finished={EMBED}, present=present))
    calls = dict(assign(schedule, range(6)))
    assert calls[0] == LoadWeights(None, "loss-gradient")
    assert calls[1] == LoadWeights(0, "weights-0000", comes_back=True)
    assert [call.beside for call in calls.values() if call.block is None] == list(range(at_head))
    for worker, call in calls.items():
        schedule.done(worker, call, None)
    first = dict(assign(schedule, range(6)))
    assert sorted(call.chunk for call in first.values()) == chunks[:at_head]
    assert 1 not in first, "no gradient is there yet"


def test_workers_load_what_chunks_will_come_to():
    schedule = TokenWeightSchedule(SHAPE)
    schedule.done(0, schedule.next_call(0), None)
    calls = [call for _, call in assign(schedule, range(13))]
    forth, back = (
        [LoadWeights(block, weights_unit(block), comes_back) for block in range(BLOCKS)] for comes_back in (False, True)
    )
    assert calls == [*forth, LoadWeights(None, "loss-gradient"), *back[::-1]]


@pytest.mark.parametrize(("workers", "guessed"), [(1, 9), (2, 6), (3, 5)])
def test_following_block_is_told_and_comes_true(workers, guessed):
    made = simulate(TokenWeightSchedule(SHAPE), workers, Disk())
    loads = [call for _, call in made if isinstance(call, LoadWeights) and call.block is not None]
    assert sum(call.was_foretold for call in loads) == guessed
    for worker, call in made:
        if isinstance(call, LoadWeights) and call.was_foretold:
            told = {each.following for other, each in made if other == worker and isinstance(each, WaveCall)}
            assert call.block in told


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("stop", range(0, 90, 10))
def test_of_a_run_that_goes_on_no_block_is_read_that_is_done_with(workers, stop):
    disk, first = Disk(), TokenWeightSchedule(SHAPE)
    simulate(first, workers, disk, stop)
    made = [call for _, call in simulate(TokenWeightSchedule(SHAPE, disk.start(first.finished)), workers, disk)]
    passed = {call.block for call in made if isinstance(call, ForwardChunk | Backward)}
    assert {call.block for call in made if isinstance(call, LoadWeights)} <= passed | {None}
    assert {call.following for call in made if isinstance(call, WaveCall)} <= passed | {None}


def test_a_node_that_is_lost_takes_no_two_calls_that_are_alike():
    """Else its eight workers that load the same would be taken for one call that failed eight times."""
    chunks = [f"c{number:04d}" for number in range(80)]
    start = StartingPoint(finished={EMBED}, present={ORIGINAL: {0: chunks}})
    schedule = TokenWeightSchedule(RunShape(1, 0, chunks), start)
    history = FailureHistory(1)
    for worker, call in list(assign(schedule, range(8))):
        failure = Failure(unit="u", place="p", method=call.verb, worker=worker, kind="lost", cause="its node died")
        history.judge(failure, call, RunError("lost"))
        schedule.failed(worker, call)


def test_what_is_told_makes_no_other_call():
    assert Backward(1, "c0000", following=0) == Backward(1, "c0000")
    assert hash(LoadWeights(1, "unit", was_foretold=True)) == hash(LoadWeights(1, "unit"))


def test_lost_worker_loads_its_block_again():
    schedule = TokenWeightSchedule(SHAPE)
    schedule.done(0, schedule.next_call(0), None)
    load = schedule.next_call(0)
    assert load == LoadWeights(0, weights_unit(0))
    schedule.failed(0, load)
    assert schedule.next_call(0) == load
    schedule.done(0, load, None)
    chunk = schedule.next_call(0)
    schedule.failed(0, chunk)
    assert schedule.next_call(0) == load


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("stop", range(0, 50, 5))
def test_goes_on_where_it_was(workers, stop):
    disk, first = Disk(), TokenWeightSchedule(SHAPE)
    before = [call for _, call in simulate(first, workers, disk, stop)]
    second = TokenWeightSchedule(SHAPE, disk.start(first.finished))
    after = [call for _, call in simulate(second, workers, disk)]
    assert not {call for call in before if not isinstance(call, LoadWeights)} & set(after)
    assert second.complete


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("fails", [{0}, {3, 4}, {16, 17, 18}, {20}, {25, 29}])
def test_calls_that_fail_are_made_again(workers, fails):
    schedule = TokenWeightSchedule(SHAPE)
    simulate(schedule, workers, Disk(), fails=fails)
    assert schedule.complete


@pytest.mark.parametrize("stop", [8, 18, 24, 30])
def test_whatever_is_lost_is_made_again(stop):
    disk, first = Disk(), TokenWeightSchedule(SHAPE)
    simulate(first, 2, disk, stop)
    for lost in sorted(disk.files):
        if lost[0] == "weights":
            continue
        damaged = Disk()
        damaged.files = disk.files - {lost}
        again = TokenWeightSchedule(SHAPE, damaged.start(first.finished))
        simulate(again, 2, damaged)
        assert again.complete


def test_only_blocks_that_are_asked_for_are_weighed():
    disk = Disk()
    schedule = TokenWeightSchedule(SHAPE, blocks=[3])
    made = [call for _, call in simulate(schedule, 2, disk)]
    assert schedule.units == [EMBED, *map(weights_unit, range(BLOCKS))]
    assert schedule.finished == set(schedule.units)
    assert {call.block for call in made if isinstance(call, Backward)} == {3, 4}
    assert TokenWeightSchedule(SHAPE, blocks=[]).complete


@pytest.mark.parametrize(("num_chunks", "telling"), [(1, [0]), (2, [1]), (3, [1, 2]), (6, [3, 4, 5])])
def test_second_half_of_the_chunks_tells_what_follows(num_chunks, telling):
    assert [passed for passed in range(num_chunks) if tells_following(passed, num_chunks)] == telling


@pytest.mark.parametrize("workers", [2, 5, 16])
@pytest.mark.parametrize("seed", range(8))
def test_workers_that_are_lost_at_any_time_leave_no_other_waiting(workers, seed):
    """Calls end in any order, and one in six comes to nothing."""
    chance, schedule, disk, running = random.Random(seed), TokenWeightSchedule(SHAPE), Disk(), {}
    while not schedule.complete:
        for worker, call in list(assign(schedule, [each for each in range(workers) if each not in running])):
            running[worker] = call
        assert running, "nothing can be done, and nothing is being done"
        worker = chance.choice(sorted(running))
        call = running.pop(worker)
        if chance.random() < 1 / 6:
            schedule.failed(worker, call)
        else:
            disk.do(call)
            for spent in schedule.done(worker, call, None):
                disk.drop(spent)
