"""Runs on texts of several kinds: what was read is recorded, and asked for again when a run goes on."""

import html
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file

from astro.errors import ConfigError
from astro_dist import pipeline
from astro_dist.export.finished_run import FinishedRun
from astro_dist.planning.validate import prepare, require_text
from astro_dist.report.findings import Findings
from astro_dist.report.forecast import plan
from astro_dist.report.html import write_report
from tests.astro_dist.source.test_calibration_text import glm_tokenizer


@pytest.fixture
def dataset(dataset_hub, tmp_path):
    """What publishes the next commit of a dataset, in which every row has a given word."""

    def publish(word):
        folder = tmp_path / word
        folder.mkdir()
        pq.write_table(pa.table({"text": [f"{word} {number} " * 30 for number in range(40)]}), folder / "train.parquet")
        return dataset_hub.publish("org/text", folder)

    return publish


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_a_run_keeps_the_commit_of_its_text(dataset, run_config, tmp_path, monkeypatch):
    first, real = dataset("first"), pipeline.assemble
    config = run_config(calibration__source="org/text")
    monkeypatch.setattr(pipeline, "assemble", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(config)
    second = dataset("second")
    monkeypatch.setattr(pipeline, "assemble", real)
    pipeline.quantize(config)
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    assert identity["texts"]["0"]["commit"] == first
    card = FinishedRun.open(tmp_path / "run").card(None).text
    assert f"[org/text](https://huggingface.co/datasets/org/text) (split `train`, commit `{first}`)" in card
    assert f"revision: {first}" in card
    with pytest.raises(ConfigError, match=f"another run .*commit of calibration.source: {first} there, {second} here"):
        pipeline.quantize(run_config(calibration__source="org/text", calibration__revision=second))


def test_what_was_taken_of_each_text_is_recorded(dataset, run_config, tmp_path):
    dataset("word")
    (tmp_path / "lines.txt").write_text("some lines of text\n" * 400)
    sources = [
        {"source": "org/text", "share": 0.7},
        {"source": str(tmp_path / "lines.txt"), "share": 0.3},
    ]
    pipeline.quantize(run_config(calibration__sources=sources, calibration__samples=10))
    texts = json.loads((tmp_path / "run" / "run.json").read_text())["texts"]
    assert [(texts[i]["share"], texts[i]["samples"], texts[i]["holdout_samples"]) for i in "01"] == [
        (0.7, 7, 2),
        (0.3, 3, 1),
    ]
    card = FinishedRun.open(tmp_path / "run").card(None).text
    assert ", 7 of them; `lines.txt`, 3 of them, seed 0" in card
    assert str(tmp_path) not in card


def test_a_short_text_makes_a_short_run(run_config, tmp_path):
    (tmp_path / "a.txt").write_text("some lines of text\n" * 70)
    keys = {"source": str(tmp_path / "a.txt"), "samples": "auto", "holdout_samples": "auto"}
    config = run_config(**{f"calibration__{key}": value for key, value in keys.items()})
    planned = require_text(prepare(config))
    summary = pipeline.quantize(config)
    assert [note for note in summary.notes if "instead of" in note] == [n for n in planned.notes if "instead of" in n]
    finished = FinishedRun.open(tmp_path / "run").config.calibration
    assert finished == planned.config.calibration
    assert (finished.samples, finished.holdout_samples) == (20, 6)
    tokens = load_file(tmp_path / "run" / "tokens.safetensors")
    assert sum(len(rows) for name, rows in tokens.items() if name.startswith("c")) == 20
    assert pipeline.quantize(config) == summary  # it goes on as the same run


@pytest.mark.parametrize("weights", ["norm", "loss"])
def test_tokens_that_begin_every_sequence_are_no_text(run_config, llama, tmp_path, weights):
    glm_tokenizer().save_pretrained(llama)
    measured = pipeline.quantize(run_config(calibration__token_weights=weights)).perplexity
    tokens = load_file(tmp_path / "run" / "tokens.safetensors")["h0000"]
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        log_p = model(tokens).logits.log_softmax(-1)[:, :-1]
    losses = -log_p.gather(-1, tokens[:, 1:, None])[..., 0]
    assert (tokens[:, :2] == torch.tensor([258, 259])).all()
    assert measured.original == pytest.approx(float(losses[:, 1:].mean().exp()), rel=1e-5)
    assert measured.original != pytest.approx(float(losses.mean().exp()), rel=1e-4)


@pytest.mark.parametrize(
    ("samples", "what"), [(2, "its Hessian is singular"), (6, "its Hessian is a rough estimate"), (11, None)]
)
def test_too_little_text_is_said_before_and_after(run_config, tmp_path, samples, what):
    """The widest layer has 128 inputs, and a sequence 48 tokens."""
    note = (
        f"{48 * samples} calibration tokens are few for model.layers.0.mlp.down_proj, which has 128 inputs: {what}; "
        "give at least 512 tokens (calibration.samples × sequence_length)"
    )
    config = run_config(calibration__samples=samples)
    planned = str(plan(config))
    summary = pipeline.quantize(config)
    card = FinishedRun.open(tmp_path / "run").card(None).text
    page = html.unescape(write_report(Findings.read(tmp_path / "run")).read_text())
    if what is None:
        assert not any("are few for" in text for text in (planned, card, page, *summary.notes))
        assert "Nothing: no damping was raised" in card
        return
    assert f"note: {note}" in planned.splitlines()
    assert note in summary.notes
    assert f"\n- {note}\n" in card
    assert f"<li>{note}</li>" in page
    assert "Nothing: no damping was raised" not in card


def test_rounding_to_nearest_wants_no_text(run_config):
    prepared = require_text(prepare(run_config(calibration__samples=2, quantization__method="rtn")))
    assert not any("are few for" in note for note in prepared.notes)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"execution__mode": "stages", "calibration__chunk_samples": 6}, "make calibration.chunk_samples smaller"),
        (
            {"execution__mode": "stages", "calibration__chunk_samples": 6, "execution__hessian_shares": 1},
            "make calibration.chunk_samples smaller",
        ),
        (
            {"execution__mode": "sequential", "execution__hessian_shares": 1},
            "make execution.hessian_shares larger, or calibration.chunk_samples smaller",
        ),
    ],
)
def test_share_that_cannot_be_measured_on_halves_is_said(run_config, changes, advice):
    notes = [note for note in pipeline.quantize(run_config(**changes)).notes if "in one piece" in note]
    assert len(notes) == 1
    assert "is 0.25" in notes[0]
    assert notes[0].endswith(advice)
    for measured in (
        {"quantization__compensation": 0.5},
        {"execution__mode": "blocks"},
        {"quantization__method": "rtn"},
    ):
        assert "in one piece" not in str(plan(run_config(**{**changes, **measured})))
