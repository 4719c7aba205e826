"""Outlier channels, kurtosis and weights, streamed: a planted outlier is found, figures are the whole model's."""

import dataclasses
import io
import json
import re
import sys

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file

from astro.errors import ConfigError, NumericalError
from astro_dist import cli, pipeline
from astro_dist.config.schema import TextSource
from astro_dist.evaluation.inspection import InspectRequest, inspect_model
from astro_dist.evaluation.judge_settings import JudgeSettings
from astro_dist.report.inspection_words import TITLES, inspection_table
from tests.support.architectures import DENSE, EXPERTS
from tests.support.models import LLAMA, write_checkpoint

CPU = JudgeSettings(device="cpu", dtype="float32")
CHANNEL = 5


def request(**changes):
    text = TextSource(source="python-docs", share=1.0)
    return InspectRequest(**{"text": text, "window": 24, "limit": 2, **changes})


def plant(folder, layer="layers.1", channel=CHANNEL, factor=200.0):
    """Let a channel of the norm before a block's attention be large, so that q, k and v read an outlier channel."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if layer in name and "input_layernorm" in name:
                tensor[channel] *= factor
        save_file(tensors, path, {"format": "pt"})
    return folder


def by_name(figures):
    return {name: layer for layer in figures.layers for name in layer.names}


def test_planted_outlier_channel_is_found_where_it_is(llama):
    figures = by_name(inspect_model(str(plant(llama)), request(), CPU).now)
    for name, layer in figures.items():
        planted = "layers.1.self_attn." in name and "o_proj" not in name
        if "down_proj" in name:  # what reads the products of gate and up has outliers of its own
            continue
        assert (CHANNEL in layer.outlier_channels) == planted, name
    assert figures["model.layers.1.self_attn.q_proj"].input_ratio > 6


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_figures_are_those_of_the_whole_model(name, tmp_path):
    folder = write_checkpoint(tmp_path / name, DENSE[name])
    inspection = inspect_model(str(folder), request(), CPU)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    from pydoc_data import topics

    text = "\n\n".join(text for _, text in sorted(topics.topics.items()))
    ids = torch.tensor(tokenizer(text[:4000])["input_ids"][:48]).view(2, 24)
    seen = {}
    for each, module in model.named_modules():
        module.register_forward_hook(lambda _, args, y, each=each: seen.update({each: (args, y)}))
    with torch.no_grad():
        model(ids, use_cache=False)
    assert inspection.now.layers
    for layer in inspection.now.layers:
        (X, *_), Y = seen[layer.names[0]]
        size = X.flatten(0, -2).abs()
        W = model.get_submodule(layer.names[0]).weight.detach()
        assert layer.tokens == 48
        assert layer.input_max == pytest.approx(float(size.max()), rel=1e-5)
        assert layer.input_ratio == pytest.approx(float(size.mean(0).max() / size.mean()), rel=1e-4)
        expected = (size.mean(0) > 6 * size.mean()).nonzero().flatten().tolist()
        assert list(layer.outlier_channels) == expected
        centered = Y - Y.mean(-1, keepdim=True)
        kurtosis = (centered / centered.square().mean(-1, keepdim=True).sqrt()).pow(4).mean()
        assert layer.output_kurtosis == pytest.approx(float(kurtosis), rel=1e-3)
        assert layer.weight_max == pytest.approx(float(W.abs().max()), rel=1e-5)
        assert layer.weight_ratio == pytest.approx(float(W.abs().max() / W.square().mean().sqrt()), rel=1e-4)


def test_experts_are_summed_up_as_one_kind_and_those_without_tokens_are_counted(tmp_path):
    folder = write_checkpoint(tmp_path / "mixtral", EXPERTS["mixtral"])
    figures = inspect_model(str(folder), request(limit=1, window=2), CPU).now
    kinds = figures.by_kind()
    assert any("experts.*." in kind for kind in kinds)
    assert figures.unseen > 0
    seen = sum(map(len, kinds.values()))
    assert seen + figures.unseen == 2 * (4 + 2 * 4)  # q, k, v, o; gate with up, and down, of four experts


def test_result_of_a_run_is_read_and_its_outputs_differ_from_the_source(run_config, llama):
    config = run_config()
    pipeline.quantize(config)
    inspection = inspect_model(str(config.output.dir), request(against=str(llama)), CPU)
    assert inspection.before is not None
    now, before = by_name(inspection.now), by_name(inspection.before)
    assert now.keys() == before.keys()
    first = "model.layers.0.self_attn.q_proj"
    assert now[first].input_max == before[first].input_max
    assert now[first].weight_max != before[first].weight_max


def test_one_block_is_in_memory_at_a_time(llama, monkeypatch):
    from astro_dist.evaluation import streamed_model

    most = []
    real = streamed_model.forward

    def forward(block, state, call):
        most.append(next(block.parameters()).is_meta)
        return real(block, state, call)

    monkeypatch.setattr(streamed_model, "forward", forward)
    model = inspect_model(str(llama), request(), CPU)
    assert most == [False] * 3
    assert len(model.now.layers) == 21


def test_overflow_is_an_error_that_names_the_layer(llama):
    plant(llama, factor=float("inf"))
    with pytest.raises(NumericalError, match=r"an input of model.layers.1.self_attn.q_proj is not finite"):
        inspect_model(str(llama), request(), CPU)


def test_text_that_is_not_there_is_refused(llama):
    text = TextSource(source="nothing.txt", share=1.0)
    with pytest.raises(ConfigError, match="--text nothing.txt: there is no such file"):
        inspect_model(str(llama), request(text=text), CPU)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["astro-dist", "inspect", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_command_prints_a_table_a_page_and_json(llama, tmp_path, monkeypatch, capsys):
    before = write_checkpoint(tmp_path / "before", transformers.LlamaConfig(**LLAMA))
    plant(before)
    short = (llama, "--window", 24, "--limit", 2, "--device", "cpu")
    code, out, _ = run(monkeypatch, capsys, *short, "--against", before, "--html", tmp_path / "page.html")
    assert code == 0
    assert "5 → 1 outlier channel;" in " ".join(out.split())
    page = (tmp_path / "page.html").read_text()
    assert "Largest channel of every layer" in page
    assert page.count('class="heat"') == 6
    ratios = page[page.index("Largest channel") : page.index("Kurtosis of every")]
    assert len(set(re.findall(r"<span>[\d.]+ or less</span>", ratios))) == 1  # both models have the same colours
    code, out, _ = run(monkeypatch, capsys, before, "--window", 24, "--limit", 2, "--json")
    assert [layer["outlier_channels"] for layer in json.loads(out)["now"]["layers"]].count([CHANNEL]) == 3
    code, out, _ = run(monkeypatch, capsys, before, "--window", 24, "--limit", 2)
    assert f"model.layers.1.self_attn.q_proj: 1 outlier channel ({CHANNEL})" in " ".join(out.split())


def test_table_of_two_models_keeps_headers_and_figures_whole_at_80_columns(llama):
    inspection = inspect_model(str(llama), request(), CPU)
    seen, most = inspection.now, (5,) * 100
    layers = [dataclasses.replace(layer, outlier_channels=most, input_kurtosis=12345.6) for layer in seen.layers]
    now = dataclasses.replace(seen, layers=tuple(layers))
    console = Console(file=io.StringIO(), width=80)
    console.print(inspection_table(dataclasses.replace(inspection, now=now, before=seen)))
    shown = console.file.getvalue()
    assert "…" not in shown
    assert all(word in shown for title in TITLES for word in title.split())
    kinds = len(now.by_kind())
    assert len(re.findall(r"\(3\) +300  \d: 100 +[\d.]+ +12345\.6 ", shown)) == kinds
    assert len(re.findall(r"^ +before +\d+ ", shown, re.MULTILINE)) == kinds
