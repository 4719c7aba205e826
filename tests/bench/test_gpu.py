"""The bench for a GPU finds on a CPU what it should, and a step that hangs or fails costs itself alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).with_name("gpu.py")


def findings(out, *arguments):
    command = [sys.executable, str(BENCH), "--out", str(out), "--work", str(out / "work"), "--device", "cpu", "--tiny"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, [json.loads(line) for line in (out / "findings.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_step_but_ray_passes_on_a_cpu(tmp_path):
    steps = "machine,arithmetic,loops,runs,block8b,experts,peer,block405b"
    code, lines = findings(tmp_path, "--only", steps, "--stretch", "6", "--seconds", "800")
    assert [line for line in lines if line.get("ok") is False] == []
    assert code == 0
    assert [line["step"] for line in lines if line["name"] == "step"] == steps.split(",")
    (block,) = (line for line in lines if line["name"] == "block8b")
    assert block["calls_s"]["SolveBlock"] > 0 < block["plan_gb"]
    assert {"gptq", "refine", "tune"} <= set(block["floor_s"]) | set(block["phases_s"])


def test_a_step_without_time_is_ended_or_not_begun(tmp_path):
    code, lines = findings(tmp_path, "--only", "machine", "--stretch", "0.001")
    assert code == 1
    assert lines[-1]["error"] == "ended with no result in time"
    code, lines = findings(tmp_path, "--only", "machine", "--seconds", "1")
    assert "left" in lines[-1]["skipped"]
