"""Devices that are too small for a worker are named with both sizes, and a CPU is measured for itself."""

import itertools
import types

import pytest
import torch

from astro.errors import ConfigError
from astro_dist.planning import devices
from astro_dist.planning.devices import gpu_here, measure, memory_shortage


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


@pytest.mark.parametrize(
    ("name", "gigabytes", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 85, "h100"),
        ("NVIDIA A100-SXM4-40GB", 42, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 85, "a100"),
        ("NVIDIA L40S", 48, "l40s"),
        ("NVIDIA L4", 24, "l4"),
        ("NVIDIA GeForce RTX 4090", 25, "rtx4090"),
    ],
)
def test_gpu_of_this_machine_is_known_by_name_and_memory(name, gigabytes, expected, monkeypatch):
    properties = types.SimpleNamespace(name=name, total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert gpu_here().name == expected
    properties.name = "NVIDIA Tesla T4"
    with pytest.raises(ConfigError, match="is called NVIDIA Tesla T4, whose figures are not known"):
        gpu_here()
