"""A run that is interrupted anywhere, then loses files and workers, still comes to its end without a missing file."""

import random
from collections import defaultdict

import pytest

from astro_dist.schedule.block_parallel import BlockSchedule
from astro_dist.schedule.calls import (
    Embed,
    EvaluateLoss,
    FinishingCall,
    Forward,
    ForwardChunk,
    OpenBlock,
    SolveBlock,
    WriteBlock,
)
from astro_dist.schedule.names import block_of_unit, block_unit, is_held_out, stream_names, unit_names
from astro_dist.schedule.schedule import RunShape, StartingPoint, assign
from astro_dist.schedule.spent import SpentInputs, SpentShard
from tests.astro_dist.schedule.test_block_parallel import result

CHUNKS = ["c0000", "c0001", "h0000", "h0001"]
BLOCKS = 3


class Disk:
    """What a run directory holds, and what is not there when it is asked for."""

    def __init__(self, rounds):
        self.streams, self.finished, self.shards = stream_names(rounds), set(), set()
        self.inputs = defaultdict(set)

    def read_for(self, call):
        """A call finds what it reads."""
        match call:
            case Forward(r, block, chunk):
                assert chunk in self.inputs[self.streams[r], block], call
            case OpenBlock(r, block) if r:
                assert (r - 1, block) in self.shards, call
            case ForwardChunk(stream, block, chunk):
                r = self.streams.index(stream)
                assert chunk in self.inputs[stream, block], call
                assert r == 0 or (r - 1, block) in self.shards, call
            case EvaluateLoss(stream):
                assert {c for c in CHUNKS if is_held_out(c)} <= self.inputs[stream, BLOCKS], call

    def write(self, call, spent):
        """What a call leaves, and what is dropped then."""
        match call:
            case Embed():
                for stream in self.streams:
                    self.inputs[stream, 0] |= set(CHUNKS)
            case Forward(r, block, chunk) if block + 1 < BLOCKS or is_held_out(chunk):
                self.inputs[self.streams[r], block + 1].add(chunk)
            case ForwardChunk(stream, block, chunk):
                self.inputs[stream, block + 1].add(chunk)
            case SolveBlock() | WriteBlock():
                self.shards.add(call.place)
        if isinstance(call, FinishingCall):
            self.finished.add(call.unit)
        for gone in spent:
            match gone:
                case SpentInputs(block, stream) if block:
                    self.inputs[stream, block] = set()
                case SpentShard(r, block):
                    self.shards.discard((r, block))

    def schedule(self, rounds):
        """As it is made when a run goes on: a block whose shard is gone is finished only where a later round is."""
        written, finished = set(), set()
        shards = {block_unit(*place) for place in self.shards}
        for unit in reversed(unit_names(BLOCKS, 1, rounds, True)):
            place = block_of_unit(unit)
            superseded = place and block_unit(place[0] + 1, place[1]) in finished
            if unit in self.finished and (not place or unit in shards or superseded):
                finished.add(unit)
                written |= {unit} if not place or unit in shards else set()
        self.finished = set(finished)
        present = {s: {b: set(self.inputs[s, b]) for b in range(BLOCKS + 1)} for s in self.streams}
        return BlockSchedule(RunShape(BLOCKS, 1, CHUNKS), StartingPoint(finished, present, written), rounds)

    def lose_something(self, dice):
        places = sorted((s, b, c) for (s, b), chunks in self.inputs.items() for c in chunks if b)
        for stream, block, chunk in dice.sample(places, min(len(places), dice.choice([1, 2]))):
            self.inputs[stream, block].discard(chunk)
        if self.shards and dice.random() < 0.5:
            self.shards.discard(dice.choice(sorted(self.shards)))


def go_on(disk, rounds, num_workers, dice, loss, stop_after=10_000):
    schedule, workers, running, count = disk.schedule(rounds), list(range(num_workers)), {}, 0
    while not schedule.complete and count < stop_after:
        begun = dict(assign(schedule, [worker for worker in workers if worker not in running]))
        for call in begun.values():
            disk.read_for(call)
        running |= begun
        assert running, "stuck"
        worker = dice.choice(sorted(running))
        call, count = running.pop(worker), count + 1
        if len(workers) > 1 and dice.random() < loss:
            schedule.failed(worker, call)
            workers.remove(worker)
        else:
            disk.write(call, schedule.done(worker, call, result(call)))
        assert count < 2000, "goes round in circles"


@pytest.mark.parametrize("seeds", [range(start, start + 150) for start in range(0, 600, 150)], ids=str)
def test_whatever_is_lost_the_run_comes_to_its_end(seeds):
    for seed in seeds:
        dice = random.Random(seed)
        rounds = dice.choice([1, 2, 3])
        disk = Disk(rounds)
        go_on(disk, rounds, dice.choice([1, 2, 4]), dice, 0.0, stop_after=dice.randint(1, 70 * rounds))
        disk.lose_something(dice)
        go_on(disk, rounds, dice.choice([1, 2, 3]), dice, dice.choice([0.0, 0.1]))
