"""Smoothed inputs in whole runs: exact where nothing is rounded, the same bytes however the work is shared out."""

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from astro.activation_config import Activations
from astro.errors import CheckpointError, ConfigError
from astro.formats import compressed_tensors
from astro.storage.checkpoint import Checkpoint
from astro_dist import pipeline
from astro_dist.export.smoothing_file import SMOOTHING_NAME
from astro_dist.export.verify import verify_model
from astro_dist.report.findings import Findings
from astro_dist.report.html import write_report
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.unit_record import SmoothingResult
from astro_dist.schedule.names import smoothing_unit
from astro_dist.worker.smoother import Smoother
from tests.support.architectures import DENSE, EXPERTS, IDS
from tests.support.dequantized import write_dequantized
from tests.support.models import write_checkpoint

FINE = {"quantization__bits": 8, "quantization__group_size": 8, "quantization__method": "rtn"}
RULES = {
    "aser": {"activations__bits": 8, "activations__smoothing": "aser", "activations__outlier_channels": 6},
    "smoothquant": {"activations__bits": 8, "activations__smoothing": "smoothquant"},
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


@pytest.fixture
def all_served(monkeypatch):
    """Servers take rounded inputs of experts with groups of 128 alone, which tiny models are too narrow for."""
    monkeypatch.setattr(compressed_tensors, "inputs_refusal", lambda *_: "")


@pytest.mark.usefixtures("all_served")
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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llama",
            {
                "q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm", "o_proj": "v_proj",
                "down_proj": "up_proj",
            },
        ),
        (
            "opt",
            {
                "q_proj": "self_attn_layer_norm", "fc1": "final_layer_norm", "out_proj": "v_proj",
                "fc2": "no norm or linear layer before it can take its factors exactly",
            },
        ),
        (
            "mixtral",
            {
                "q_proj": "input_layernorm", "gate_up_proj": "post_attention_layernorm", "o_proj": "v_proj",
                "w2": "w3",
            },
        ),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("all_served")
def test_every_input_is_told_of(run_config, tmp_path, name, expected):
    source = with_outliers(write_checkpoint(tmp_path / "source", MODELS[name]))
    summary = pipeline.quantize(run_config(model__source=str(source), **RULES["aser"]))
    assert places(smoothing(tmp_path / "run")) == expected
    unsmoothed = [kind for kind in summary.smoothing if kind.reason]
    assert len(unsmoothed) == sum(" " in place for place in expected.values())
    for kind in summary.smoothing:
        assert kind.inputs == (8 if kind.name == "experts.w2" else 2)
        assert bool(kind.channels) != bool(kind.reason)
        told = [note for note in summary.notes if kind.in_words in note]
        assert bool(told) == bool(kind.reason)
        assert kind.in_words in (Path(summary.model) / "README.md").read_text()
        assert kind.in_words in write_report(Findings.read(tmp_path / "run")).read_text()


def test_result_is_compared_with_its_smoothed_source(run_config, source, tmp_path):
    summary = pipeline.quantize(run_config(**FINE, **RULES["smoothquant"]))
    errors = verify_model(tmp_path / "run", source).relative_weight_errors
    assert max(errors.values()) < 0.01
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in Path(summary.model).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / SMOOTHING_NAME).unlink()
    assert max(verify_model(folder, source).relative_weight_errors.values()) > 0.1
    (folder / SMOOTHING_NAME).write_bytes((Path(summary.model) / SMOOTHING_NAME).read_bytes())
    norm = "model.layers.1.input_layernorm.weight"
    shard = folder / Checkpoint.open(folder).place(norm).rpartition("/")[2]
    tensors = load_file(shard)
    tensors[norm][0] *= 2
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.input_layernorm\.weight is not that of"):
        verify_model(folder, source)


def test_input_whose_factors_change_the_block_stays_as_it_is(run_config, source, tmp_path, monkeypatch):
    real = Smoother._smoothed

    def spoil(self, unit, tensors, whole, place, groups, statistics):
        smoothed = real(self, unit, tensors, whole, place, groups, statistics)
        return dataclasses.replace(smoothed, changes=smoothed.changes[1:]) if "mlp" in place.name else smoothed

    monkeypatch.setattr(Smoother, "_smoothed", spoil)
    summary = pipeline.quantize(run_config(**RULES["smoothquant"]))
    assert places(smoothing(tmp_path / "run"))["down_proj"] == "the block returns something else with it"
    assert any("down_proj: 3 inputs not smoothed" in note for note in summary.notes)
    assert smoothing(tmp_path / "run").largest_change < 1e-6


def test_reader_that_is_not_quantized_is_scaled_too(run_config, source, tmp_path):
    ignored = "model.layers.0.mlp.gate_proj"
    changes = {"quantization__ignore": [ignored], "model__source": str(source)}
    summary = pipeline.quantize(run_config(**FINE, **RULES["smoothquant"], **changes))
    key = f"{ignored}.weight"
    written, original = (Checkpoint.open(f).read([key])[key] for f in (Path(summary.model), source))
    assert not torch.equal(written, original)
    write_dequantized(source, Path(summary.model), tmp_path / "dequantized")
    assert distance(tmp_path / "dequantized", source) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_sources_in_16_bits_keep_their_dtype(run_config, tmp_path, name, dtype):
    source = with_outliers(write_checkpoint(tmp_path / "source", MODELS[name], dtype))
    summary = pipeline.quantize(run_config(model__source=str(source), **FINE, **RULES["smoothquant"]))
    assert smoothing(tmp_path / "run").largest_change < 1e-5
    result = Checkpoint.open(Path(summary.model))
    norm = "model.layers.0.input_layernorm.weight"
    assert result.read([norm])[norm].dtype == dtype
    write_dequantized(source, Path(summary.model), tmp_path / "dequantized")
    assert distance(tmp_path / "dequantized", source) < 0.03


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smoothing": "aser"}, "bits: 16 rounds none"),
        ({"bits": 8, "outlier_channels": 8}, "no effect without smoothing: aser"),
        ({"bits": 8, "smoothing": "smoothquant", "outlier_channels": 8}, "no effect without smoothing: aser"),
        ({"bits": 8, "smoothing": "aser", "smoothing_strength": 0.6}, "no effect without smoothing: smoothquant"),
        ({"bits": 8, "smoothing": "smoothquant", "smoothing_strength": 1.5}, "expected 0 to 1, got 1.5"),
        ({"bits": 8, "smoothing": "aser", "outlier_channels": 0}, "expected at least 1, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Activations(**changes)
