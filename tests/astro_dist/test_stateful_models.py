"""Whole runs of models whose blocks hand on more than hidden states, or are called otherwise for each text."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from astro.errors import RunError
from astro_dist import pipeline
from astro_dist.export.verify import verify_model
from astro_dist.run_directory.records import RunDirectory
from astro_dist.worker.call_recorder import CallRecorder
from astro_dist.worker.worker import Worker
from tests.support.architectures import STATEFUL
from tests.support.dequantized import write_dequantized
from tests.support.models import files_of, write_checkpoint

MODES = {"blocks": {}, "sequential": {"execution__mode": "sequential", "execution__hessian_shares": 2}}
READS_TEXT = ("gemma4-e", "deepseek-v4")
"""Models of which blocks are called with something that depends on the text."""


@pytest.fixture
def config(run_config, tmp_path):
    def build(name, **changes):
        source = tmp_path / name
        if not source.exists():
            write_checkpoint(source, STATEFUL[name])
        return run_config(
            model__source=str(source), quantization__group_size=16, calibration__holdout_samples=8,
            calibration__token_weights="loss", **changes,
        )  # fmt: skip

    return build


@torch.no_grad()
def last_hidden(folder, tokens):
    """What the last block of the whole model returns, and the perplexity of the text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    seen = []
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    blocks[-1].register_forward_hook(lambda m, a, output: seen.append(output))
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
    return (seen[0][0] if isinstance(seen[0], tuple) else seen[0]), float(loss.exp())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STATEFUL)
def test_states_are_those_of_the_whole_model(config, tmp_path, monkeypatch, name, mode):
    for method in ("drop", "drop_leftovers"):
        monkeypatch.setattr(RunDirectory, method, lambda self, *spent: None)
    run = config(name, **MODES[mode])
    summary = pipeline.quantize(run)
    activations, last = tmp_path / "run" / "activations", STATEFUL[name].num_hidden_layers
    texts = load_file(tmp_path / "run" / "tokens.safetensors")
    perplexities = []
    for chunk in ("h0000", "h0001"):
        hidden, perplexity = last_hidden(tmp_path / name, texts[chunk])
        ours = load_file(activations / "original" / f"{last:04d}" / f"{chunk}.safetensors")
        assert set(ours) == {"hidden"}, "nothing but hidden states leaves the last block"
        assert torch.equal(ours["hidden"], hidden)
        perplexities.append(perplexity)
    assert bool(list(activations.glob("calls/h0000-*"))) == (name in READS_TEXT)
    assert summary.perplexity.original == pytest.approx((perplexities[0] * perplexities[1]) ** 0.5, rel=1e-5)
    write_dequantized(tmp_path / name, Path(summary.model), tmp_path / "dequantized")
    perplexities = [last_hidden(tmp_path / "dequantized", texts[chunk])[1] for chunk in ("h0000", "h0001")]
    assert summary.perplexity.quantized == pytest.approx((perplexities[0] * perplexities[1]) ** 0.5, rel=1e-4)
    assert not any("no gradient passes" in note for note in summary.notes)
    verify_model(Path(summary.model), tmp_path / name)


@pytest.mark.parametrize("name", ["gemma4-e", "hy-v4"])
@pytest.mark.parametrize("mode", MODES)
def test_number_of_workers_does_not_change_a_byte(config, tmp_path, name, mode):
    results = []
    for workers in (1, 5):
        changes = {**MODES[mode], "output__dir": str(tmp_path / f"run{workers}"), "execution__workers": workers}
        results.append(files_of(Path(pipeline.quantize(config(name, **changes)).model)))
    assert results[0] == results[1]


def test_calls_of_one_text_that_are_lost_or_damaged_are_recorded_again(config, tmp_path, monkeypatch):
    whole = pipeline.quantize(config("gemma4-e", output__dir=str(tmp_path / "whole")))

    def fail(self, call):
        raise RuntimeError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "solve_block", fail)
        with pytest.raises(RunError, match="lost"):
            pipeline.quantize(config("gemma4-e", execution__max_retries=0))
    first, *_, last = sorted((tmp_path / "run" / "activations" / "calls").iterdir())
    first.unlink()
    save = CallRecorder.save

    def save_and_damage(self):  # it is found while the run goes on
        save(self)
        if not damaged:
            damaged.append(last.write_bytes(last.read_bytes()[:-1]))

    damaged: list[object] = []
    monkeypatch.setattr(CallRecorder, "save", save_and_damage)
    again = pipeline.quantize(config("gemma4-e"))
    assert damaged
    assert files_of(Path(again.model)) == files_of(Path(whole.model))
