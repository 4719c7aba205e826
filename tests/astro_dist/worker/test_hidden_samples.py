"""The error of the hidden states behind every block is measured on its way, in both modes and every round."""

import threading

import pytest
import torch
import transformers

from astro.storage import part_writer
from astro.storage.checked_tensors import save_part
from astro_dist import pipeline
from astro_dist.run_directory.layout import RunLayout
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.unit_record import LossResult
from astro_dist.schedule.names import head_unit
from astro_dist.worker import hidden_samples
from astro_dist.worker.hidden_samples import hidden_errors, sample_of
from tests.support.fake_gpu import fake_gpu


def keep(run, stream, index, chunk, hidden):
    save_part(run.sample(stream, index, chunk), sample_of(hidden))


def test_errors_are_those_of_the_kept_tokens(tmp_path):
    run, generator = RunLayout(tmp_path), torch.Generator().manual_seed(0)
    source = torch.randn(2, 40, 8, generator=generator)
    drift = torch.randn(2, 40, 8, generator=generator)
    keep(run, "original", 1, "h0000", source)
    keep(run, "round-0", 1, "h0000", source + drift)
    last = [40 * (i + 1) // 16 - 1 for i in range(16)]
    expected = (drift[:, last].double().norm(dim=-1) / source[:, last].double().norm(dim=-1)).mean()
    assert hidden_errors(run, "round-0", 2, ["h0000"]) == (pytest.approx(float(expected)), None)


def test_lanes_of_hidden_states_count_together(tmp_path):
    run = RunLayout(tmp_path)
    keep(run, "original", 1, "h0000", torch.full((1, 3, 2, 4), 2.0))
    keep(run, "round-0", 1, "h0000", torch.full((1, 3, 2, 4), 2.5))
    assert hidden_errors(run, "round-0", 1, ["h0000"]) == (0.25,)


def test_a_gpu_is_not_waited_for():
    with fake_gpu() as gpu:
        sample = sample_of(torch.empty(2, 40, 3, 8, dtype=torch.bfloat16, device="cuda"))["sample"]
    assert (sample.shape, sample.dtype) == ((32, 24), torch.bfloat16)
    assert not gpu.crossings
    assert not gpu.waits


@pytest.mark.parametrize("changes", [{"execution__rounds": 2}, {"execution__mode": "sequential"}])
def test_runs_record_what_the_whole_models_give(run_config, tmp_path, changes, monkeypatch):
    monkeypatch.setattr(hidden_samples, "_TOKENS", 1000)  # all of them
    config = run_config(**changes)
    summary = pipeline.quantize(config)
    run = RunDirectory(tmp_path / "run", "", rounds=config.execution.rounds)
    results = [run.read(head_unit(f"round-{r}"), LossResult).hidden_errors for r in range(config.execution.rounds)]
    assert all(len(errors) == 3 and all(error > 0 for error in errors) for errors in results)
    assert run.read(head_unit("original"), LossResult).hidden_errors == ()
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        for place in (config.model.source, summary.model)
    ]
    from astro.storage.checked_tensors import load_part

    tokens, _ = load_part(run.tokens)
    ids = torch.cat([chunk for name, chunk in sorted(tokens.items()) if name.startswith("h")])
    with torch.no_grad():
        # The last hidden states that transformers returns have passed the final norm.
        states = [model(ids, output_hidden_states=True).hidden_states[1:3] for model in models]
    for block, (source, result) in enumerate(zip(*states, strict=True)):
        expected = ((result - source).norm(dim=-1) / source.norm(dim=-1)).mean()
        assert results[-1][block] == pytest.approx(float(expected), rel=1e-2)


def test_samples_are_written_while_the_worker_goes_on(run_config, monkeypatch):
    threads, real = {}, part_writer.save_part

    def save(path, tensors, note=""):
        threads.setdefault(threading.current_thread().name.partition("_")[0], []).append(path)
        real(path, tensors, note)

    monkeypatch.setattr(part_writer, "save_part", save)
    monkeypatch.setattr("astro.storage.checked_tensors.save_part", save)
    config = run_config()
    pipeline.quantize(config)
    samples = {path for path in threads["writer"] if "sample" in str(path)}
    run = RunLayout(config.output.dir)
    assert run.sample("original", 1, "h0000") in samples
    assert run.sample("round-0", 2, "h0000") in samples
