"""Whole runs whose scales are tuned, on every architecture."""

import pytest

from astro.quantization.grid import QuantizedLinear
from astro_dist import pipeline
from astro_dist.export.verify import verify_model
from astro_dist.report.findings import Findings
from astro_dist.worker import block_tuner
from astro_dist.worker.block_runner import BlockRunner
from tests.support.architectures import DENSE, EXPERTS, STATEFUL
from tests.support.models import files_of, write_checkpoint

ARCHITECTURES = {**DENSE, **EXPERTS, **STATEFUL}
ROUTES_ANEW = ("longcat-flash", "hy-v4")
"""With so small a random router a step may send tokens to other experts, of which its gradient knows nothing."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scales_of_every_architecture_are_tuned(run_config, tmp_path, name):
    source = files_of(write_checkpoint(tmp_path / name, ARCHITECTURES[name]))
    config = run_config(
        model__source=str(tmp_path / name), quantization__group_size=16, quantization__bits=3,
        quantization__tune_steps=20, calibration__holdout_samples=0, calibration__token_weights="norm",
    )  # fmt: skip
    summary = pipeline.quantize(config)
    figures = summary.tuning
    assert figures.steps == 20
    assert figures.blocks
    assert 0 < figures.fall < 1
    assert name in ROUTES_ANEW or not figures.untuned, figures.reason
    assert any("stay as they were solved" in note for note in summary.notes) == bool(figures.untuned)
    verify_model(tmp_path / "run" / "model")
    assert files_of(tmp_path / name) == source
    for block in Findings.read(tmp_path / "run").blocks.values():
        if block.layers:
            assert (block.tuning.after < block.tuning.before) == (not block.tuning.reason)
            assert block.tuning.after <= block.tuning.before


@pytest.mark.parametrize("name", ["llama", *STATEFUL])
@pytest.mark.parametrize("mode", ["blocks", "sequential"])
def test_every_step_takes_one_sequence(run_config, tmp_path, monkeypatch, name, mode):
    """Also where blocks are called otherwise for each text: alone it has the outputs that it has in its chunk."""
    write_checkpoint(tmp_path / name, ARCHITECTURES[name])
    seen, real = [], block_tuner.tune_scales

    def tune_scales(layers, solved, texts, *others):
        alone = [text.forward() for text in texts]
        seen.append(
            [(text.wanted.shape[:2], float((alone[i] - text.wanted).abs().max())) for i, text in enumerate(texts)]
        )
        return real(layers, solved, texts, *others)

    monkeypatch.setattr(block_tuner, "tune_scales", tune_scales)
    config = run_config(
        model__source=str(tmp_path / name), quantization__group_size=16, quantization__tune_steps=5,
        calibration__holdout_samples=0, execution__mode=mode, quantization__compensation=0.0,
    )  # fmt: skip
    pipeline.quantize(config)
    assert len(seen) == ARCHITECTURES[name].num_hidden_layers
    for texts in seen:
        assert [shape for shape, _ in texts] == [(1, 48)] * 5
        # The block is still the original one.
        assert max(difference for _, difference in texts) < 1e-4


@pytest.mark.parametrize("compensation", [0.0, "auto"])
def test_what_the_source_returns_is_wanted_where_weights_make_up_for_earlier_errors(
    run_config, monkeypatch, compensation
):
    """Of the first block, which has none before it, and of all others where nothing is made up for, it is their own."""
    away, real = [], block_tuner.tune_scales

    def tune_scales(layers, solved, texts, *others):
        away.append(max(float((text.forward() - text.wanted).abs().max()) for text in texts))
        return real(layers, solved, texts, *others)

    monkeypatch.setattr(block_tuner, "tune_scales", tune_scales)
    pipeline.quantize(
        run_config(
            quantization__tune_steps=5,
            quantization__bits=2,
            quantization__compensation=compensation,
            execution__mode="sequential",
            execution__hessian_shares=2,
            calibration__holdout_samples=0,
        )
    )
    assert [distance > 1e-2 for distance in away] == [False] + 2 * [compensation == "auto"]
    assert away[0] < 1e-4


def test_tiles_that_others_solved_are_tuned_on_the_device(run_config, tmp_path, monkeypatch):
    moved, real = [], QuantizedLinear.to
    monkeypatch.setattr(QuantizedLinear, "to", lambda self, device: moved.append(self) or real(self, device))
    before, tune = [], block_tuner.tune_scales

    def tune_scales(layers, solved, *others):
        before.append([each for each in moved if any(each.Q is layer.Q for layer in solved.values())])
        return tune(layers, solved, *others)

    monkeypatch.setattr(block_tuner, "tune_scales", tune_scales)
    pipeline.quantize(run_config(quantization__tune_steps=2, execution__mode="sequential"))
    assert [len(layers) for layers in before] == [7, 7, 7]


def test_rounded_keys_and_values_are_minded(run_config, tmp_path, monkeypatch):
    scales = []
    real = BlockRunner.serving

    def serving(self, stream, unit, cache_scales=None):
        scales.append(cache_scales)
        return real(self, stream, unit, cache_scales)

    monkeypatch.setattr(BlockRunner, "serving", serving)
    config = run_config(quantization__tune_steps=20, activations__kv_cache="fp8", calibration__holdout_samples=0)
    summary = pipeline.quantize(config)
    assert len([each for each in scales if each]) > 3 * 20
    assert not summary.tuning.untuned
