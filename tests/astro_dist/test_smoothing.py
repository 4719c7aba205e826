"""Smoothed inputs in whole runs: exact where nothing is rounded, the same bytes however the work is shared out."""

from pathlib import Path

import pytest
import torch
import transformers

from astro.storage.checkpoint import Checkpoint
from astro_dist import pipeline
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.unit_record import SmoothingResult
from astro_dist.schedule.names import smoothing_unit
from tests.support.models import files_of

SMOOTHED = {"activations__bits": 8, "activations__smoothing": "smoothquant"}


def smoothing(root, block=0):
    run = RunDirectory(Path(root), "")
    return run.read(smoothing_unit(block), SmoothingResult)


def test_every_input_of_a_llama_is_smoothed(run_config, tmp_path):
    pipeline.quantize(run_config(**SMOOTHED))
    result = smoothing(tmp_path / "run")
    into = [(s.layers[0].rpartition(".")[2], s.into.rpartition(".")[2], s.reason) for s in result.smoothed_inputs]
    assert into == [
        ("q_proj", "input_layernorm", ""), ("gate_proj", "post_attention_layernorm", ""), ("o_proj", "v_proj", ""),
        ("down_proj", "up_proj", ""),
    ]  # fmt: skip
    assert result.checked_in == "torch.float64"
    assert result.largest_change < 1e-6
