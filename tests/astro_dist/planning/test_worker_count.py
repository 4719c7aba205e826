"""One rule says how many workers `auto` stands for, to those who start them and to those who foretell."""

import os

import pytest
import torch

from astro.errors import ConfigError
from astro_dist.config.execution import ExecutionConfig
from astro_dist.planning.worker_count import count_note, foretold_workers, machine_cpus, places


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


@pytest.mark.parametrize(
    ("keys", "has_gpus", "count"),
    [
        ({}, False, 6),
        ({"threads_per_worker": 4}, False, 1),
        ({"workers": 3}, False, 3),
        ({"executor": "local"}, False, 1),
        ({"ray_address": "10.0.0.1:6379"}, False, 1),
        ({}, True, 1),
    ],
)
def test_foretold_workers(keys, has_gpus, count):
    execution = ExecutionConfig(**keys)
    assert foretold_workers(execution, has_gpus) == count
    leaves_it_open = has_gpus or "ray_address" in keys
    assert (count_note(execution, has_gpus) is not None) == leaves_it_open


def test_a_worker_that_this_machine_has_no_room_for_is_refused():
    with pytest.raises(ConfigError, match="threads_per_worker: 8, but this machine has 6 CPUs"):
        foretold_workers(ExecutionConfig(threads_per_worker=8), has_gpus=False)
    assert machine_cpus(ExecutionConfig(threads_per_worker=8, workers=2)) == 16


def test_places_are_counted_node_by_node():
    nodes = [{"CPU": 7.0, "GPU": 2.0}, {"CPU": 4.0}, {"CPU": 1.0, "GPU": 8.0}]
    assert places(nodes, threads=2, has_gpus=False) == 5
    assert places(nodes, threads=2, has_gpus=True) == 2


def test_gpus_of_this_machine_are_counted_where_no_other_cluster_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    here, elsewhere = ExecutionConfig(), ExecutionConfig(ray_address="ray://head:10001")
    assert (foretold_workers(here, has_gpus=True), count_note(here, has_gpus=True)) == (3, None)
    assert foretold_workers(elsewhere, has_gpus=True) == 1
    assert "planned for one worker" in count_note(elsewhere, has_gpus=True)
