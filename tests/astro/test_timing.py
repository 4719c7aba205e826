"""Phases wait for a GPU where they begin and end, and nothing waits in between; a CPU is never waited for."""

import ast
import time
from pathlib import Path

import pytest
import torch

from astro.timing import Stopwatch, clock_s, timed
from tests.support.devices import here

ROOT = Path(__file__).parents[2]
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def events(monkeypatch):
    """What happens, in order: waits for the device, and looks at the clock, which goes on by a second each time."""
    happened = []

    class Event:
        """An event of a stream that begins its first span after 10 s and takes 2 s for each."""

        count = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at_s, Event.count = 10 + 2 * Event.count, Event.count + 1
            happened.append("record")

        def synchronize(self):
            happened.append("wait for event")

        def elapsed_time(self, end):
            return 1000 * (end.at_s - self.at_s)

    def perf_counter():
        happened.append("clock")
        return float(happened.count("clock"))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append(f"wait for {device}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(time, "perf_counter", perf_counter)
    return happened


def test_a_phase_waits_before_every_look_at_the_clock_and_not_within(events):
    seconds = {"gptq": 3.0}
    with timed(seconds, "gptq", GPU):
        events.append("work")
    assert events == ["wait for cuda", "clock", "work", "wait for cuda", "clock"]
    assert seconds == {"gptq": 4.0}


def test_a_cpu_is_not_waited_for(events):
    with timed({}, "gptq", CPU), Stopwatch(CPU).running():
        clock_s(CPU)
    assert set(events) == {"clock"}


def test_a_stopwatch_waits_only_when_it_is_read(events):
    watch = Stopwatch(GPU)
    for _ in range(3):
        with watch.running():
            events.append("work")
    assert events == ["record", "work", "record"] * 3
    assert watch.read_s() == watch.read_s() == 6.0
    assert events[9:] == ["wait for event"] * 3


def test_a_stopwatch_on_a_cpu_adds_up_its_spans(events):
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch.running():
            pass
    assert watch.read_s() == 2.0


@pytest.mark.usefixtures("device")
def test_a_stopwatch_counts_its_spans_and_not_what_is_between_them():
    watch, X = Stopwatch(here()), torch.rand(512, 512)
    begin = clock_s(here())
    for _ in range(4):
        with watch.running():
            X = X @ X / 512
        time.sleep(0.05)
    spent_s = watch.read_s()
    wall_s = clock_s(here()) - begin
    assert 0 < spent_s == watch.read_s()
    assert spent_s < wall_s - 0.15


@pytest.mark.usefixtures("device")
def test_a_phase_takes_as_long_as_its_device_does():
    """The clock waits for the device, so that nothing of the phase is left for the next one."""
    X, seconds = torch.rand(1024, 1024), {}
    begin = clock_s(here())
    with timed(seconds, "work", here()):
        for _ in range(4):
            X = X @ X / 1024
    with timed(seconds, "nothing", here()):
        pass
    assert seconds["nothing"] < seconds["work"] <= clock_s(here()) - begin


def test_workers_look_at_no_other_clock():
    modules = [*(ROOT / "astro").rglob("*.py"), *(ROOT / "astro_dist" / "worker").rglob("*.py")]
    looking = {
        str(path.relative_to(ROOT))
        for path in modules
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("perf_counter", "monotonic", "process_time")
    }
    assert looking == {"astro/timing.py"}
