"""What is counted of a run that is going on."""

from types import SimpleNamespace

import pytest

from astro_dist.report import run_figures
from astro_dist.report.run_figures import FIGURES, FigureCounter, Shape
from astro_dist.schedule.calls import Backward, Forward, ForwardChunk, OpenBlock
from astro_dist.schedule.names import block_unit


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(run_figures.time, "monotonic", lambda: now.s)
    return now


def counter_of(share_done=0.5):
    outlook = SimpleNamespace(
        share_done=share_done, seconds_left=90.0, took=lambda call, s: None, resized=lambda n: None
    )
    return FigureCounter(Shape(3, 2, {"c0000": 600, "h0000": 600}), {block_unit(0, 0), "embed"}, outlook)


def take(counter, clock, call, seconds, worker=0):
    counter.started(worker, call)
    clock.s += seconds
    counter.ended(worker, call, None, None)


def test_only_calibration_tokens_that_pass_forward_count(clock):
    counter = counter_of()
    for call in (
        OpenBlock(0, 1), Forward(0, 1, "c0000"), Forward(0, 1, "h0000"), ForwardChunk("original", 0, "c0000", "u"),
        ForwardChunk("original", 0, "h0000", "u"), Backward(0, "c0000"),
    ):  # fmt: skip
        take(counter, clock, call, 10.0)
    assert counter.figures().tokens_per_second == pytest.approx(1200 / 60)


def test_rate_is_that_of_the_last_minutes(clock):
    counter = counter_of()
    take(counter, clock, Forward(0, 1, "c0000"), 1.0)
    clock.s += 200
    take(counter, clock, Forward(0, 1, "c0000"), 99.0)
    clock.s += 210
    assert counter.figures().tokens_per_second == pytest.approx(600 / 300)
    clock.s += 300
    assert counter.figures().tokens_per_second == 0


def test_what_is_not_known_yet_is_no_number(clock):
    numbers = counter_of(share_done=0.01).figures().numbers()
    assert FIGURES.keys() - numbers.keys() == {"seconds_left", "largest_layer_error", "worker_memory_bytes"}
    assert (numbers["blocks"], numbers["blocks_done"]) == (6, 1)
    assert counter_of().figures().numbers()["seconds_left"] == 90
