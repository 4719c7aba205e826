"""Smoothed inputs in whole runs: exact where nothing is rounded, the same bytes however the work is shared out."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from astro.model.smoothed_tensors import SmoothedInput
from astro.storage.checkpoint import Checkpoint
from astro_dist import pipeline
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.unit_record import SmoothingResult
from astro_dist.schedule.names import smoothing_unit
from astro_dist.worker import smoother
from astro_dist.worker.worker import Worker
from tests.support.architectures import DENSE, EXPERTS, IDS
from tests.support.dequantized import write_dequantized
from tests.support.models import files_of, write_checkpoint

FINE = {"quantization__bits": 8, "quantization__group_size": 8, "quantization__method": "rtn"}
RULES = {
    "aser": {"activations__bits": 8, "activations__smoothing": "aser", "activations__outlier_channels": 6},
    "smoothquant": {"activations__bits": 4, "activations__smoothing": "smoothquant"},
}
SEQUENTIAL = {"execution__mode": "sequential", "execution__hessian_shares": 2}
MODES = {
    "blocks": RULES["aser"],
    "loss": {**RULES["smoothquant"], "calibration__token_weights": "loss"},
    "rounds": {**RULES["smoothquant"], "execution__rounds": 2},
    "sequential": {**RULES["smoothquant"], **SEQUENTIAL},
    "loss, sequential": {**RULES["aser"], **SEQUENTIAL, "calibration__token_weights": "loss"},
}
MODELS = DENSE | EXPERTS
NAMES = ("llama", "gemma3", "phi3", "qwen2", "opt", "falcon", "gpt2", "cohere", "mixtral", "qwen2-moe", "deepseek-v3")


def smoothing(root, block=0):
    return RunDirectory(Path(root), "").read(smoothing_unit(block), SmoothingResult)


def places(result):
    """Where each input went, by the last name of its first layer."""
    return {s.layers[0].rpartition(".")[2]: s.into.rpartition(".")[2] or s.reason for s in result.smoothed_inputs}


@torch.no_grad()
def distance(folder, source):
    """Median relative difference of logits; a few tokens may go to another expert."""
    models = (transformers.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (folder, source))
    logits, expected = (model(IDS).logits for model in models)
    return float((logits - expected).abs().median() / expected.abs().median())


def with_outliers(source):
    """Give norms, values and gated products outlier channels, as trained models have them."""
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            is_norm = tensor.ndim == 1 and ("norm" in name or "ln_" in name) and "bias" not in name
            if is_norm or "v_proj.weight" in name or "up_proj.weight" in name:
                tensor[[1, 5, 9]] *= 20
        save_file(tensors, path, {"format": "pt"})
    return source


@pytest.fixture
def source(llama):
    return with_outliers(llama)


@pytest.mark.parametrize("mode", MODES)
def test_source_is_what_it_was_and_fine_grids_give_its_logits(run_config, source, tmp_path, mode):
    plain = {k: v for k, v in MODES[mode].items() if not k.startswith("activations")}
    before = pipeline.quantize(run_config(output__dir=str(tmp_path / "plain"), **FINE, **plain))
    summary = pipeline.quantize(run_config(**FINE, **MODES[mode]))
    assert any(s.columns.values for s in smoothing(tmp_path / "run").smoothed_inputs)
    assert summary.perplexity.original == before.perplexity.original, "powers of two change no bit"
    result, original = Checkpoint.open(Path(summary.model)), Checkpoint.open(source)
    norm = "model.layers.0.post_attention_layernorm.weight"
    assert not torch.equal(result.read([norm])[norm], original.read([norm])[norm])
    write_dequantized(source, Path(summary.model), tmp_path / "dequantized")
    assert distance(tmp_path / "dequantized", source) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_many_kinds_return_what_they_did(run_config, tmp_path, name):
    source = with_outliers(write_checkpoint(tmp_path / "source", MODELS[name]))
    summary = pipeline.quantize(run_config(model__source=str(source), **FINE, **RULES["smoothquant"]))
    result = smoothing(tmp_path / "run", 1)
    assert result.checked_in == "torch.float64"
    assert result.largest_change < 1e-6
    assert any(s.columns.values for s in result.smoothed_inputs)
    write_dequantized(source, Path(summary.model), tmp_path / "dequantized")
    assert distance(tmp_path / "dequantized", source) < 0.02
