"""The waves that measure token weights, simulated: order, workers, what is lost and made again."""

import itertools

import pytest

from astro_dist.schedule.calls import Backward, DifferentiateLoss, Embed, ForwardChunk, WeighTokens
from astro_dist.schedule.names import EMBED, ENERGY, GRADIENT, ORIGINAL, weights_unit
from astro_dist.schedule.schedule import RunShape, StartingPoint, assign
from astro_dist.schedule.spent import SpentInputs
from astro_dist.schedule.token_weights import TokenWeightSchedule

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
    made = [call for _, call in simulate(TokenWeightSchedule(SHAPE), workers, disk)]
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
    heads = [(worker, call.opens) for worker, call in made if isinstance(call, DifferentiateLoss)]
    assert [opens for _, opens in heads] == [True, False, False]
    assert len({worker for worker, _ in heads}) == 1


@pytest.mark.parametrize(("num_waiting", "num_workers"), [(7, 1), (8, 2), (23, 3), (60, 4)])
def test_head_is_shared_by_as_many_workers_as_chunks_wait_for(num_waiting, num_workers):
    """One worker is at the head, with a chunk, and others wait there."""
    chunks = [f"c{number:04d}" for number in range(1 + num_waiting)]
    present = {ORIGINAL: {0: chunks, 1: chunks}}
    schedule = TokenWeightSchedule(RunShape(1, 0, chunks), StartingPoint(finished={EMBED}, present=present))
    calls = [call for _, call in assign(schedule, range(4))]
    assert calls == [DifferentiateLoss(chunk) for chunk in chunks[:num_workers]]
    assert all(call.opens for call in calls)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("stop", range(0, 38, 5))
def test_goes_on_where_it_was(workers, stop):
    disk, first = Disk(), TokenWeightSchedule(SHAPE)
    before = [call for _, call in simulate(first, workers, disk, stop)]
    second = TokenWeightSchedule(SHAPE, disk.start(first.finished))
    after = [call for _, call in simulate(second, workers, disk)]
    assert not set(before) & set(after)
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
