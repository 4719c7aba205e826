"""Rounds, mode `sequential`, overrides and a width budget: whole runs on a tiny checkpoint."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from astro.checkpoint import Checkpoint
from astro_dist import pipeline
from astro_dist.verify import verify_model
from tests.conftest import files_of

SEQUENTIAL = {"execution__mode": "sequential", "execution__hessian_shares": 2}
MODES = {
    "rounds": {"execution__rounds": 2, "quantization__bits": 3},
    "sequential": {**SEQUENTIAL, "quantization__bits": 3},
    "uncompensated": {**SEQUENTIAL, "quantization__compensation": 0.0},
    "budget": {"execution__rounds": 2, "quantization__bits": "auto", "quantization__average_bits": 3.5},
}


def model_of(summary):
    return Path(summary["model"])


@pytest.mark.parametrize("mode", MODES)
def test_number_of_workers_does_not_change_a_byte(run_config, tmp_path, mode):
    results = []
    for workers in (1, 2, 3):
        folder = str(tmp_path / f"run{workers}")
        summary = pipeline.quantize(run_config(execution__workers=workers, output__dir=folder, **MODES[mode]))
        results.append(files_of(model_of(summary)))
    assert results[0] == results[1] == results[2]
    verify_model(model_of(summary))
    assert not (tmp_path / "run1" / "activations").exists()
    assert not list((tmp_path / "run1").glob("rounds/*/*"))
