"""What a program or a notebook calls."""

import logging
import subprocess
import sys

import pytest

import astro_dist

SHORT = ["calibration.samples=4", "calibration.chunk_samples=4", "calibration.holdout_samples=2"]
HERE = ["execution.executor=local", "execution.device=cpu", "regularizer.iterations=3"]


def test_a_model_is_planned_quantized_and_looked_at(llama, tmp_path, monkeypatch, capsys):
    for logger in (logging.getLogger(), logging.getLogger("astro_dist")):  # as in a program that decides nothing
        monkeypatch.setattr(logger, "handlers", [])
    config = astro_dist.run_config(llama, [*SHORT, *HERE, "calibration.sequence_length=32"], output=tmp_path / "run")
    assert isinstance(config, astro_dist.RunConfig)
    forecast = astro_dist.plan(config)
    print(forecast)
    assert "CPU worker: about" in capsys.readouterr().out
    assert forecast.needed.worker_bytes > 0
    assert forecast.to_json()["quantized_weights"] == forecast.prepared.plan.weights
    summary = astro_dist.quantize(config)
    assert summary.perplexity.quantized > 0
    assert "finished already" not in capsys.readouterr().err
    assert astro_dist.quantize(config) == summary
    assert "run: this run was finished already; nothing was done" in capsys.readouterr().err
    assert astro_dist.status(tmp_path / "run").state == "complete"


def test_importing_it_is_quick():
    code = "import sys, astro_dist; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_not_there_is_told():
    with pytest.raises(AttributeError, match="module 'astro_dist' has no attribute 'quantise'"):
        astro_dist.quantise  # noqa: B018


def test_every_name_is_there():
    assert all(callable(getattr(astro_dist, name)) for name in astro_dist.__all__)
