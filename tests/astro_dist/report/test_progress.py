"""The display on a terminal and in a log."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from astro_dist.report import progress
from astro_dist.report.progress import ProgressDisplay
from astro_dist.report.run_figures import FigureCounter, Shape
from astro_dist.run_directory.unit_record import BlockResult
from astro_dist.schedule.calls import CopyTensors, Forward, SolveBlock
from astro_dist.schedule.names import block_unit


class HalfDone:
    """An outlook that is always half way."""

    share_done, seconds_left, workers = 0.5, 90.0, 0

    def took(self, call, seconds):
        pass

    def resized(self, workers):
        self.workers = workers


@pytest.fixture
def display(monkeypatch):
    """A display of a run of 30 blocks, on a terminal of a given width or in a log; what it wrote is in `text`."""

    def make(width=None):
        file = io.StringIO()
        console = Console(file=file, width=width or 300, height=40, force_terminal=width is not None, color_system=None)
        monkeypatch.setattr(progress, "Console", lambda stderr: console)
        shown = ProgressDisplay(
            Shape(30, 1, {"c0000": 4096, "c0001": 4096, "h0000": 4096}), {block_unit(0, 0)}, HalfDone()
        )
        shown.text = file.getvalue
        return shown

    return make


def solved(name, error):
    layers = (SimpleNamespace(name=name, relative_error=error),)
    return BlockResult(
        layers=layers, seconds={}, host="here", device="cpu", torch="2", peak_rss_bytes=2_000_000_000,
        peak_device_bytes=0, cache_scales={},
    )  # fmt: skip


def picture(display, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(display._picture())
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [80, 140])
def test_terminal_shows_bar_figures_and_workers(display, width, monkeypatch):
    monkeypatch.setattr(FigureCounter, "_tokens_per_second", lambda self: 1234.4)
    shown = display(width)
    for worker in range(2):
        shown.joined(worker)
    shown.started(0, Forward(0, 2, "c0001"))
    shown.started(1, SolveBlock(0, 1))
    finished = {block_unit(0, 0), block_unit(0, 1)}
    name = "model.layers.1.self_attn.q_proj+model.layers.1.self_attn.k_proj"
    shown.ended(1, SolveBlock(0, 1), finished, solved(name, 0.0123))
    lines = picture(shown, width)
    assert lines[0].startswith("2/30 blocks ━")
    assert "about 90 s left" in lines[0]
    assert len(lines[0]) == width
    figures = "1,234 tokens/s · 2.0 GB a worker · largest layer error 0.0123 (model.layers.1.self_attn.q_proj)"
    assert lines[1].strip() == (figures if len(figures) <= width else f"{figures[: width - 1]}…")
    assert lines[2].strip() == "worker 0   block 3 of 30 · calibrating 2/2"
    assert len(lines) == 3


def test_a_lost_worker_is_counted(display):
    shown = display(80)
    shown.joined(0)
    shown.started(0, SolveBlock(0, 1))
    shown.left(0)
    assert picture(shown, 80)[1].strip() == "1 retry"
    shown.left(0)  # it was idle, or never up
    assert picture(shown, 80)[1].strip() == "1 retry"


def test_nothing_is_left_behind_on_a_terminal(display):
    shown = display(80)
    with shown:
        shown.say("stays")
    erased = shown.text().rpartition("\x1b[1A")[2]
    assert "blocks" not in erased


def test_a_log_has_a_line_for_each_block(display):
    shown = display()
    shown.joined(3)
    shown.started(3, SolveBlock(0, 1))
    shown.ended(3, SolveBlock(0, 1), {block_unit(0, 0), block_unit(0, 1)})
    assert shown.text().rstrip().endswith("] block 2 of 30 done by worker 3; 2 of 30 blocks, about 90 s left")


def test_a_log_is_never_silent_for_long(display, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    monkeypatch.setattr(progress, "time", clock)
    shown, on_terminal = display(), display(80)
    for worker in (0, 1, 2):
        shown.joined(worker)
    shown.started(0, Forward(0, 2, "c0001"))
    shown.started(2, CopyTensors(0))

    def lines_at(now):
        clock.now = now
        for each in (shown, on_terminal):
            each.passed()
        return shown.text().splitlines()

    assert [len(lines_at(now)) for now in (59.0, 61.0, 120.0, 122.0)] == [0, 1, 1, 2]
    last = lines_at(123.0)[-1]
    assert "] 1 of 30 blocks, about 90 s left; worker 0: block 3 of 30 · calibrating 2/2, worker 2: " in last
    assert last.endswith(", 1 idle")
    shown.started(1, SolveBlock(0, 1))
    clock.now = 181.0
    shown.ended(1, SolveBlock(0, 1), {block_unit(0, 0), block_unit(0, 1)})  # has a line of its own
    assert [len(lines_at(now)) for now in (183.0, 240.0, 242.0)] == [3, 3, 4]
    assert on_terminal.text() == ""
