"""The card says what the records say, and its metadata is what the Hub reads."""

import dataclasses
import json
from pathlib import Path

import huggingface_hub
import pytest
import yaml

import astro
from astro.quantization.layer_record import Fallbacks
from astro.storage.atomic import sha256_of
from astro_dist import pipeline
from astro_dist.export.finished_run import FinishedRun
from astro_dist.export.model_card import metadata
from astro_dist.run_directory.journal import Failed
from astro_dist.source.model_info import BaseModel


@pytest.fixture
def run(first_run):
    return FinishedRun.open(first_run)


def section(card, title):
    return card.text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_metadata_is_what_the_hub_reads(run, online_hub):
    card = run.card("org/model")
    assert card.data.to_dict() == {
        "base_model": "org/llama", "base_model_relation": "quantized", "library_name": "transformers",
        "license": "apache-2.0", "language": ["en", "de"], "pipeline_tag": "text-generation", "quantized_by": "org",
        "tags": ["quantized", "4-bit", "compressed-tensors", "gptq", "astro", "astro-dist", "vllm"],
    }  # fmt: skip
    card.validate()


def test_server_that_checks_cards_finds_what_is_wrong(run, online_hub):
    card = run.card("org/model")
    card.data.license = "other"
    with pytest.raises(ValueError, match="license_link"):
        card.validate()


def test_dtype_is_left_to_transformers_where_inputs_have_no_grid_of_their_own(run):
    assert "float32" not in section(run.card("org/model"), "How to load it")


def test_card_is_written_into_every_model(run):
    text = (run.run.model / "README.md").read_text()
    assert text == str(run.card(None))
    assert "quantized_by: astro-dist" in text
    assert huggingface_hub.ModelCard(text).data.base_model == "org/llama"


def test_figures_are_those_of_the_records(run):
    card, perplexity = run.card("org/model"), run.summary.perplexity
    assert f"| original | {perplexity.original:.3f} |" in section(card, "Accuracy")
    assert f"| quantized | {perplexity.quantized:.3f} |" in section(card, "Accuracy")
    layers = [layer for block in run.run.blocks().values() for layer in block.layers]
    largest = max(layer.relative_error for layer in layers if "o_proj" in layer.name)
    (row,) = [line for line in section(card, "How it was quantized").splitlines() if "`o_proj`" in line]
    assert "| 3 | 4 | " in row
    assert f"{largest:.3g} (`model.layers." in row
    assert run.identity.tokens_sha256 in section(card, "Calibration data")
    assert "3 on x86_64, torch" in section(card, "Hardware and time")


def test_configuration_on_the_card_makes_the_same_run_and_tells_no_place(run, first_run):
    reproduce = section(run.card("org/model"), "How to reproduce it")
    shown = yaml.safe_load(reproduce.split("```yaml\n")[1].split("```")[0])
    source = str(first_run.parent / "llama")
    shown["model"]["source"] = source
    assert type(run.config).model_validate(shown).arithmetic() == run.config.arithmetic()
    assert str(first_run.parent) not in str(run.card("org/model"))


def test_fallbacks_and_retries_are_listed(run):
    retry = Failed(time=0.0, unit="embed", method="embed", worker=0, kind="lost", cause="it was lost")
    summary = dataclasses.replace(
        run.summary,
        fallbacks=Fallbacks(("model.layers.0.a",), {"rtn": ("model.layers.1.experts.7.up_proj",)}),
        notes=("no server has a kernel for 3 bits",),
        retries=(retry, retry),
    )
    changed = dataclasses.replace(run, summary=summary)
    told = section(changed.card(None), "What was degraded, what to know")
    assert "- `model.layers.0.a`: its damping had to be raised" in told
    assert (
        "- `model.layers.1.experts.7.up_proj`: fewer than 256 tokens reached it (`experts.min_tokens`), rtn instead"
        in told
    )
    assert "no server has a kernel for 3 bits" in told
    assert "2 calls failed and were done again" in told


@pytest.mark.parametrize(
    ("base", "bits", "expected"),
    [
        (BaseModel(), {4}, {"license": "unknown"}),
        (BaseModel(license="other", license_name="x", license_link="LICENSE"), {3}, {"license_link": "LICENSE"}),
        (BaseModel(name="a/b", license="mit"), {4, 8}, {"base_model": "a/b", "base_model_relation": "quantized"}),
    ],
)
def test_metadata_of_sources_that_tell_more_or_less(run, base, bits, expected):
    told = metadata(run.config, base, bits, None).to_dict()
    assert expected.items() <= told.items()
    assert ("base_model_relation" in told) == (base.name is not None)
    assert ("3-bit" if bits == {3} else "4-bit" if bits == {4} else "mixed-precision") in told["tags"]
    assert "vllm" in told["tags"]  # it has kernels for 2 to 8 bits in this format


@pytest.mark.parametrize(
    ("changes", "title", "expected"),
    [
        ({"calibration__holdout_samples": 0}, "Accuracy", "Perplexity was not measured"),
        ({"quantization__bits": 3}, "How to load it", "on a CUDA GPU (by its source, not tried"),
        ({"quantization__format": "gptq"}, "How to load it", "gptqmodel optimum"),
        ({"quantization__format": "gptq", "quantization__bits": 3}, "How to load it", "No server has kernels"),
        ({}, "How it was quantized", "quantized 99.7 % of the blocks' weights; left in 16 bits: "),
    ],
)
def test_card_of_other_runs(run_config, tmp_path, changes, title, expected):
    pipeline.quantize(run_config(regularizer__name="none", **changes))
    card = FinishedRun.open(tmp_path / "run").card(None)
    assert expected in section(card, title)
    assert f"by astro-dist {astro.__version__} (GPTQ), format" in card.text
    assert "astro" not in card.data.tags


def test_base_model_of_a_finished_run_can_be_corrected(run_config):
    first = pipeline.quantize(run_config())
    again = pipeline.quantize(run_config(model__name="org/right"))
    assert (first.base_model.name, again.base_model.name) == (None, "org/right")
    folder = Path(again.model)
    assert "base_model: org/right" in (folder / "README.md").read_text()
    inventory = json.loads((folder.parent / "model.json").read_text())["files"]
    assert {file["name"]: file["sha256"] for file in inventory} == {p.name: sha256_of(p) for p in folder.iterdir()}


def test_card_says_that_paths_are_shortened_only_where_they_are(run, monkeypatch, tmp_path):
    words = "its paths shortened here to their last part"
    assert words in str(run.card(None))
    places = {"model": {"source": "llama"}, "output": {"dir": "run"}}
    relative = type(run.config).model_validate({**run.config.plain(), **places})
    assert words not in str(dataclasses.replace(run, config=relative).card(None))


def test_card_names_files_and_folders_without_the_paths_to_them(run):
    places = {"model": {"source": "../secret/llama"}, "output": {"dir": "secret/run"}}
    texts = [{"source": "~/secret/a.jsonl", "share": 0.5}, {"source": "org/text", "share": 0.5}]
    changes = {**places, "calibration": {"sources": texts}}
    config = type(run.config).model_validate({**run.config.plain(), **changes})
    card = str(dataclasses.replace(run, config=config).card(None))
    assert "secret" not in card
    shown = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert (shown["model"]["source"], shown["output"]["dir"]) == ("llama", "run")
    assert [text["source"] for text in shown["calibration"]["sources"]] == ["a.jsonl", "org/text"]
    of_hub = dataclasses.replace(run.identity, commit="0" * 40)
    card = str(dataclasses.replace(run, config=config, identity=of_hub).card(None))
    assert "source: ../secret/llama" in card, "a name on the Hub has two parts"
