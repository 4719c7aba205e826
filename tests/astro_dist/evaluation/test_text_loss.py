"""The perplexity of a streamed model is that of the whole model, and that of a result is what its run measured."""

import logging
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from astro.errors import CheckpointError, ConfigError, NumericalError
from astro.formats import compressed_tensors
from astro_dist import pipeline
from astro_dist.evaluation.block_weights import BlockWeights
from astro_dist.evaluation.greedy import greedy_sequences
from astro_dist.evaluation.judge_settings import JudgeSettings
from astro_dist.evaluation.streamed_model import StreamedModel
from astro_dist.evaluation.text_loss import measure_text
from astro_dist.evaluation.text_windows import TextWindows, WindowCut, cut_windows
from astro_dist.export.named_model import find_model
from astro_dist.run_directory.summary import read_summary
from tests.astro_dist.test_modes import EVERYTHING, SEQUENTIAL
from tests.support.architectures import DENSE, EXPERTS, STATEFUL
from tests.support.dequantized import write_dequantized
from tests.support.models import write_checkpoint

ARCHITECTURES = {**DENSE, **EXPERTS, **STATEFUL}
CPU = JudgeSettings(device="cpu", dtype="float32")


def windows(count=3, length=24):
    tokens = torch.randint(0, 250, (count, length), generator=torch.Generator().manual_seed(3))
    return TextWindows("random", tokens, 5)


def whole_perplexity(folder, input_ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())
    return math.exp(float(loss))


def streamed(name, settings=CPU):
    return StreamedModel(find_model(str(name)), settings)


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "gpt2", "mixtral", "gpt-oss", "glm5", "gemma4-e"])
def test_perplexity_is_the_whole_models(name, tmp_path):
    folder, text = write_checkpoint(tmp_path / name, ARCHITECTURES[name]), windows()
    found = measure_text(streamed(folder), text, 24, None)
    assert found.perplexity == pytest.approx(whole_perplexity(folder, text.input_ids), rel=1e-6)
    assert (found.windows, found.window, found.unused_tokens, found.num_readings) == (3, 24, 5, 1)


def test_one_block_is_in_memory_at_a_time(llama, monkeypatch):
    model, loaded = streamed(llama), []

    def forward(block, state, call):
        loaded.append([not next(each.parameters()).is_meta for each in model.skeleton.blocks])
        outside = [p for n, p in model.skeleton.model.named_parameters() if model.skeleton.block_of(n) is None]
        assert all(parameter.is_meta for parameter in outside)
        return real(block, state, call)

    from astro_dist.evaluation import streamed_model

    real = streamed_model.forward
    monkeypatch.setattr(streamed_model, "forward", forward)
    model.last_hidden(windows().input_ids.split(1))
    assert loaded == [[index == block for index in range(3)] for block in range(3) for _ in range(3)]


def test_little_memory_for_hidden_states_changes_no_figure(llama, caplog):
    text = windows(count=6)
    at_once = measure_text(streamed(llama), text, 48, None)
    with caplog.at_level(logging.INFO, "astro_dist"):
        little = JudgeSettings(device="cpu", dtype="float32", hidden_gb=2e-5)  # a batch takes 12 kB
        in_waves = measure_text(streamed(llama, little), text, 48, None)
    assert in_waves.perplexity == at_once.perplexity
    assert (at_once.num_readings, in_waves.num_readings) == (1, 3)
    assert "the model is read 3 times" in caplog.text


def assert_judged_as_measured(run, source):
    tokens = load_file(run / "tokens.safetensors")
    held_out = torch.cat([tokens[name] for name in sorted(tokens) if name.startswith("h")])
    text, measured = TextWindows("held out", held_out, 0), read_summary(run / "summary.json").perplexity
    found = measure_text(streamed(run), text, 48 * 3, streamed(source))
    for name in ("original", "quantized", "change", "change_error", "divergence", "agreement", "agreement_error"):
        assert getattr(found.compared, name) == pytest.approx(getattr(measured, name), rel=1e-6), name
    assert found.perplexity == found.compared.quantized


def test_perplexity_of_a_result_is_what_its_run_measured(finished):
    config = (finished / "config.yaml").read_text()
    assert_judged_as_measured(
        finished, next(line.split(": ")[1] for line in config.splitlines() if line.strip().startswith("source:"))
    )


@pytest.mark.parametrize(
    ("name", "mode", "inputs"),
    [("llama", "blocks", 8), ("llama", "sequential", 4), ("mixtral", "blocks", 4), ("gpt-oss", "blocks", 4)],
)
def test_inputs_of_a_result_are_rounded_as_in_its_run(name, mode, inputs, run_config, tmp_path, monkeypatch):
    # No server takes rounded inputs of experts as small as these; the arithmetic is that of large ones.
    monkeypatch.setattr(compressed_tensors, "inputs_refusal", lambda *_: None)
    source = write_checkpoint(tmp_path / "source", ARCHITECTURES[name])
    changes = {"model__source": str(source), "activations__bits": inputs, "execution__mode": mode}
    run = Path(pipeline.quantize(run_config(**changes)).model).parent
    assert_judged_as_measured(run, source)
    monkeypatch.setattr(BlockWeights, "rounding", lambda self, index: nullcontext())
    with pytest.raises(AssertionError):
        assert_judged_as_measured(run, source)


@pytest.mark.parametrize(
    "changes",
    [
        {"activations__kv_cache": "fp8"},
        EVERYTHING,
        {**EVERYTHING, "execution__rounds": 2, "quantization__bits": "auto", "quantization__average_bits": 3.5},
        {**EVERYTHING, **SEQUENTIAL, "activations__bits": 4, "quantization__group_size": 64},
    ],
)
def test_what_is_served_beside_the_weights_is_judged_as_in_its_run(changes, run_config, llama):
    run = Path(pipeline.quantize(run_config(**changes)).model).parent
    assert_judged_as_measured(run, llama)


def test_text_is_continued_alike_whether_the_result_is_kept_or_streamed(run_config, monkeypatch):
    changes = {**EVERYTHING, "activations__bits": 4, "quantization__group_size": 64}
    run = Path(pipeline.quantize(run_config(**changes)).model).parent
    prompts = [list(range(start, start + 9)) for start in range(20, 100, 10)]
    limits = [12] * len(prompts)
    kept = streamed(run)
    made = greedy_sequences(kept, prompts, limits, lambda number, tokens: False, batch_tokens=200)
    assert kept.num_readings == 1
    monkeypatch.setattr("astro_dist.evaluation.streamed_model._KEPT_SHARE", 0.0)
    assert made == greedy_sequences(streamed(run), prompts, limits, lambda number, tokens: False, batch_tokens=200)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"quantization__format": "gptq"}),
        ("llama", {"quantization__bits": 3, "quantization__symmetric": False}),
        ("mixtral", {}),
        ("mixtral", {"quantization__ignore": ["*.1.w1", "*.0.*.3.*"]}),
        ("gpt2", {}),
        ("gpt-oss", {}),
    ],
)
def test_packed_layers_are_read_in_every_layout(name, changes, tmp_path, run_config):
    source = write_checkpoint(tmp_path / "source", ARCHITECTURES[name])
    changes = {"quantization__group_size": 32, "calibration__holdout_samples": 0, **changes}
    pipeline.quantize(run_config(model__source=str(source), **changes))
    text = windows()
    found = measure_text(streamed(tmp_path / "run"), text, 48, None)
    assert found.perplexity != pytest.approx(whole_perplexity(source, text.input_ids), rel=1e-5)
    write_dequantized(source, tmp_path / "run" / "model", tmp_path / "plain")
    assert found.perplexity == pytest.approx(whole_perplexity(tmp_path / "plain", text.input_ids), rel=1e-6)


def test_weights_that_are_not_finite_are_told(llama):
    path = next(llama.glob("model-00002*.safetensors"))
    tensors = load_file(path)
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NumericalError, match="its loss on the text is nan"):
        measure_text(streamed(llama), windows(), 48, None)


def test_windows_that_do_not_fit_are_refused(llama):
    with pytest.raises(ConfigError, match="--window 200: more than the 128 positions"):
        measure_text(streamed(llama), windows(length=200), 48, None)
    text = TextWindows("random", torch.full((1, 8), 260), 0)
    with pytest.raises(CheckpointError, match="gives token 260, but the model has a vocabulary of 260"):
        measure_text(streamed(llama), text, 48, None)


def test_text_is_joined_and_cut_as_in_the_papers(llama):
    tokenizer = streamed(llama).tokenizer
    text = cut_windows("x.parquet", ["", " = A = ", "b" * 12], tokenizer, WindowCut(8))
    expected = list(b"\n\n = A = \n\nbbbbbbbbbbbb")
    made = list(tokenizer.decode(text.input_ids.flatten().tolist()).encode())
    assert (made, text.unused_tokens) == (expected[:16], len(expected) - 16)
    assert cut_windows("x", ["b" * 40], tokenizer, WindowCut(8, 2)).input_ids.shape == (2, 8)
    with pytest.raises(ConfigError, match="has 3 tokens, expected at least one window of 8"):
        cut_windows("x", ["abc"], tokenizer, WindowCut(8))
