"""Devices that are too small for a worker are named with both sizes."""

from astro_dist.planning.devices import memory_shortage


def test_a_shortage_names_both_sizes():
    message = memory_shortage(2.5e9, 8e8, "a toy")
    assert message is not None
    assert message.startswith("a worker needs about 2.5 GB, but a toy has 800.0 MB")


def test_nothing_is_said_where_the_memory_is_enough():
    assert memory_shortage(100, 100, "a toy") is None
    assert memory_shortage(100, float("inf"), "cpu") is None
