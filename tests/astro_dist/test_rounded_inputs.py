"""A run whose result tells servers to round inputs says so wherever it says what it is."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from astro_dist import pipeline
from astro_dist.evaluation.comparison import compare_runs
from astro_dist.export.finished_run import FinishedRun
from astro_dist.report.command_output import figure_lines, settings_line
from astro_dist.report.findings import Findings
from astro_dist.report.html import write_report
from astro_dist.report.tiles import headline
from astro_dist.run_directory.records import RunDirectory


@pytest.fixture
def run(run_config):
    config = run_config(activations__bits=8, quantization__group_size=-1)
    pipeline.quantize(config)
    return FinishedRun.open(config.output.dir)


def test_what_inputs_are_is_said_everywhere(run):
    assert "4 bits, one scale a row, inputs int8 per token, format" in settings_line(run.config)
    summary = json.loads((run.run.root / "summary.json").read_text())
    assert summary["inputs"] == run.summary.inputs == "int8 per token"
    assert figure_lines(run.summary)[-2].endswith("config.json asks servers to round inputs: int8 per token")
    assert " with inputs int8 per token, " in figure_lines(run.summary)[0]
    assert compare_runs([run.run.root]).runs[0].also_rounded == "inputs int8 per token"
    assert "inputs int8 per token" in headline(Findings.read(run.run.root))
    card = run.card("org/model")
    assert "bits a weight, their inputs to int8 per token, by astro-dist" in card.text
    assert "| inputs of these layers | int8 per token, rounded by the server as they come |" in card.text
    assert "vllm serve org/model --linear-backend humming\n```" in card.text
    assert "sglang" not in card.text
    assert "w4a8" in card.data.tags


def page_of(config):
    return write_report(Findings.read(config.output.dir)).read_text()


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def round_as_int8(module, args):
    """Round as compressed-tensors does, which divides by 127.5 where vLLM divides by 127."""
    scale = args[0].abs().amax(-1, keepdim=True) / 127.5
    return (torch.round(args[0] / scale).clamp(-128, 127) * scale, *args[1:])


def test_transformers_rounds_inputs_too(run, tmp_path):
    plain, ids = tmp_path / "plain", torch.arange(1, 33)[None]
    rounded = transformers.AutoModelForCausalLM.from_pretrained(run.run.model, dtype=torch.float32)
    Path(run.run.model).rename(plain)
    config = json.loads((plain / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        del group["input_activations"]
    (plain / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    exact, found = logits(model, ids), logits(rounded, ids)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(round_as_int8)
    expected = logits(model, ids)
    assert (expected - exact).norm() > 1e-3 * exact.norm()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_card_says_with_what_it_was_measured(run_config, tmp_path):
    config = run_config(activations__bits=8, activations__kv_cache="fp8")
    pipeline.quantize(config)
    assert compare_runs([config.output.dir]).runs[0].also_rounded == "inputs int8 per token, FP8 cache"
    text = FinishedRun.open(config.output.dir).card("org/model").text
    assert "with inputs rounded to int8 per token and keys and values rounded as in an FP8 cache." in text
    assert "relative error is ‖ŴX̂ − WX‖² / ‖WX‖², X̂ the inputs as they are rounded, on the calibration" in text
    assert "‖ŴX̂ − WX‖² / ‖WX‖², X̂ the inputs as they are rounded, on" in page_of(config)
    plain = run_config(output__dir=str(tmp_path / "plain"))
    pipeline.quantize(plain)
    text = FinishedRun.open(plain.output.dir).card("org/model").text
    assert "figures are those with" not in text
    assert all("‖(Ŵ − W)X‖² / ‖WX‖² on the calibration" in shown for shown in (text, page_of(plain)))


@pytest.mark.parametrize("bits", [8, 4])
def test_prediction_from_layer_errors_is_that_of_rounded_inputs(run_config, bits):
    config = run_config(activations__bits=bits, quantization__group_size=-1, calibration__token_weights="loss")
    summary = pipeline.quantize(config)
    assert 0.3 < summary.predicted_divergence / summary.perplexity.divergence < 2


TO_NEAREST = {
    "quantization__method": "rtn", "quantization__scale_search": "minmax", "quantization__compensation": 0,
    "regularizer__name": "none",
}  # fmt: skip
"""Grids that no sum over tokens moves, not even by its last bit."""


def first_errors(config):
    """Errors and energies of the first block's layers whose inputs nothing quantized comes before, by name."""
    summary = pipeline.quantize(config)
    (block,) = [
        block for place, block in RunDirectory(Path(summary.model).parent, "").blocks().items() if place[1] == 0
    ]
    return {layer.name: layer for layer in block.layers if "q_proj" in layer.name}


def test_errors_of_rounded_inputs_are_weighted_alike_in_every_mode(run_config, tmp_path):
    """The first layers read the same in both modes, here in one sum and there in three shares."""
    changes = {
        **TO_NEAREST, "activations__bits": 8, "quantization__group_size": -1, "calibration__token_weights": "loss",
        "calibration__chunk_samples": 1,
    }  # fmt: skip
    blocks = first_errors(run_config(**changes, output__dir=str(tmp_path / "blocks")))
    shares = {"execution__mode": "sequential", "execution__hessian_shares": 3}
    sequential = first_errors(run_config(**changes, **shares, output__dir=str(tmp_path / "sequential")))
    assert blocks.keys() == sequential.keys()
    assert len(blocks) == 1
    for name, layer in blocks.items():
        assert layer.token_weights == sequential[name].token_weights == "loss"
        assert sequential[name].relative_error == pytest.approx(layer.relative_error, rel=1e-5)
        assert sequential[name].output_energy == pytest.approx(layer.output_energy, rel=1e-5)
