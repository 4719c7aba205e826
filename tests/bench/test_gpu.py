"""The bench for a GPU finds on a CPU what it should, and a step that hangs or fails costs itself alone."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from astro.linalg.panels import Panels
from tests.bench import gpu, gpu_graphs

BENCH = Path(__file__).with_name("gpu.py")


def findings(out, *arguments):
    command = [sys.executable, str(BENCH), "--out", str(out), "--work", str(out / "work"), "--device", "cpu", "--tiny"]
    environment = {name: value for name, value in os.environ.items() if name not in gpu.SETTINGS}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, [json.loads(line) for line in (out / "findings.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_step_but_ray_passes_on_a_cpu(tmp_path):
    steps = "machine,arithmetic,loops,attention,runs,block8b,experts,peer,block405b"
    code, lines = findings(tmp_path, "--only", steps, "--stretch", "6", "--seconds", "800")
    assert [line for line in lines if line.get("ok") is False] == []
    assert code == 0
    assert [line["step"] for line in lines if line["name"] == "step"] == steps.split(",")
    (block,) = (line for line in lines if line["name"] == "block8b")
    assert block["calls_s"]["SolveBlock"] > 0 < block["plan_gb"]
    assert {"gptq", "refine", "tune"} <= set(block["floor_s"]) | set(block["phases_s"])


@pytest.mark.slow
@pytest.mark.ray
def test_two_actors_make_the_bytes_of_one_process(tmp_path):
    code, lines = findings(tmp_path, "--only", "ray", "--stretch", "3", "--seconds", "300")
    assert code == 0
    (found,) = (line for line in lines if line["name"] == "blocks: two actors, and one process")
    assert found["same bytes"]


def test_steps_begin_with_the_settings_of_the_product_and_stand_beside_what_was_foretold(tmp_path):
    code, lines = findings(tmp_path, "--only", "machine,attention,block405b", "--stretch", "3")
    assert code == 0, [line for line in lines if not line.get("ok", True)]
    assert lines[0]["environment"] == {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }  # fmt: skip
    of_attention = [line for line in lines if line["name"].startswith("attention of")]
    assert len(of_attention) == 4
    assert all(line["same twice"] and line["forward and back_ms"] > 0 for line in of_attention)
    (wide,) = (line for line in lines if line["name"] == "128 rows of 512")
    assert wide["plan_gb"] > 0
    assert set(wide["phases_s"]) <= set(wide["floor_s"]), "each phase stands beside its least time"


@pytest.fixture
def graph_calls(monkeypatch):
    """What a GPU would be told about graphs, and what blocks are settled in between, in order."""
    calls = []

    class Graph:
        def __getattr__(self, name):
            return lambda: calls.append(name)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": Graph, "Stream": lambda: stream, "current_stream": lambda: stream,
        "stream": contextlib.nullcontext,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Panels, "settle_", lambda panels: calls.append("settle"))
    return calls


def test_a_block_of_columns_is_taken_down_once_and_then_replayed(graph_calls):
    first, second = object.__new__(Panels), object.__new__(Panels)
    with gpu_graphs.graphs():
        for _ in range(4):
            first.settle_()
        second.settle_()
    first.settle_()
    taken_down = ["capture_begin", "settle", "capture_end", "replay"]
    assert graph_calls == ["settle", *taken_down, "replay", "replay", "settle", "settle"]


def test_a_step_without_time_is_ended_or_not_begun(tmp_path):
    code, lines = findings(tmp_path, "--only", "machine", "--stretch", "0.001")
    assert code == 1
    assert lines[-1]["error"] == "ended with no result in time"
    code, lines = findings(tmp_path, "--only", "machine", "--seconds", "1")
    assert "left" in lines[-1]["skipped"]
