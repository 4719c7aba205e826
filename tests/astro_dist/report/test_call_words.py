"""What workers do fits on a few lines, however many there are."""

import pytest

from astro_dist.report.call_words import phase_of, worker_lines
from astro_dist.schedule.calls import (
    Backward,
    CopyTensors,
    DifferentiateLoss,
    Embed,
    Forward,
    LoadWeights,
    SolveBlock,
    SolveRows,
)
from astro_dist.schedule.names import LOSS_GRADIENT
from astro_dist.schedule.unit_words import UnitWords

CHUNKS = ["c0000", "c0001", "h0000"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (Forward(0, 2, "c0001"), "calibrating 2/2"),
        (Forward(0, 2, "h0000"), "measuring 1/1"),
        (DifferentiateLoss("c0001"), "differentiating the loss 2/2"),
        (Backward(2, "c0000"), "backward 1/2"),
        (SolveBlock(0, 2), "solving"),
        (SolveRows(0, 2, 0, 4), "solving 5"),
        (Embed(), "embedding"),
    ],
)
def test_a_call_is_told_by_what_it_does_and_how_far_it_is(call, words):
    assert phase_of(call, CHUNKS) == words


def test_a_few_workers_have_a_line_each():
    calls = {1: (CopyTensors(0), 2.0), 0: (Forward(0, 2, "c0000"), 1.0)}
    assert worker_lines(calls, 0, UnitWords(30), CHUNKS) == [
        "worker 0   block 3 of 30 · calibrating 1/2",
        "worker 1   copying other tensors, part 1",
    ]
    at_head = {0: (LoadWeights(None, LOSS_GRADIENT), 1.0), 1: (DifferentiateLoss("c0001"), 1.0)}
    assert worker_lines(at_head, 0, UnitWords(30), CHUNKS) == [
        "worker 0   gradient of the loss · reading",
        "worker 1   gradient of the loss · differentiating the loss 2/2",
    ]


def test_many_workers_are_counted_and_the_slowest_named():
    calls = {worker: (SolveBlock(0, worker), float(worker)) for worker in range(60)}
    calls |= {60: (Embed(), 0.5)}
    lines = worker_lines(calls, 3, UnitWords(80), CHUNKS)
    assert lines[0] == "64 workers: 60 solving, 3 idle, 1 embedding; the slowest:"
    assert [line.split()[1] for line in lines[1:]] == ["59", "58", "57"]
    assert lines[1].endswith("block 60 of 80 · solving, for 59 s")
