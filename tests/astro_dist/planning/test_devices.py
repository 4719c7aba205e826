"""Devices that are too small for a worker are named with both sizes, and a CPU is measured for itself."""

import itertools

from astro_dist.planning import devices
from astro_dist.planning.devices import measure, memory_shortage


def test_a_shortage_names_both_sizes():
    message = memory_shortage(2.5e9, 8e8, "a toy")
    assert message is not None
    assert message.startswith("a worker needs about 2.5 GB, but a toy has 800.0 MB")


def test_nothing_is_said_where_the_memory_is_enough():
    assert memory_shortage(100, 100, "a toy") is None
    assert memory_shortage(100, float("inf"), "cpu") is None


def test_time_that_other_programs_take_is_not_counted(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(devices.time, "thread_time", lambda: float(next(ticks)))  # a second between two looks
    assert measure(1, size=256, seconds=0.001).float32 == 2.0 * 256**3
