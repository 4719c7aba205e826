"""Whole runs whose scales are tuned, on every architecture."""

import pytest

from astro_dist import pipeline
from astro_dist.export.verify import verify_model
from astro_dist.report.findings import Findings
from tests.support.architectures import DENSE, EXPERTS, STATEFUL
from tests.support.models import write_checkpoint

ARCHITECTURES = {**DENSE, **EXPERTS, **STATEFUL}
ROUTES_ANEW = ("longcat-flash", "hy-v4")
"""With so small a random router a step may send tokens to other experts, of which its gradient knows nothing."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scales_of_every_architecture_are_tuned(run_config, tmp_path, name):
    write_checkpoint(tmp_path / name, ARCHITECTURES[name])
    config = run_config(
        model__source=str(tmp_path / name), quantization__group_size=16, quantization__bits=3,
        quantization__tune_steps=20, calibration__holdout_samples=0, calibration__token_weights="norm",
    )  # fmt: skip
    summary = pipeline.quantize(config)
    figures = summary.tuning
    assert figures.steps == 20
    assert figures.blocks
    assert figures.error_after < figures.error_before
    assert name in ROUTES_ANEW or not figures.untuned, figures.reason
    assert any("stay as they were solved" in note for note in summary.notes) == bool(figures.untuned)
    verify_model(tmp_path / "run" / "model")
    for block in Findings.read(tmp_path / "run").blocks.values():
        if block.layers:
            assert (block.tuning.after < block.tuning.before) == (not block.tuning.reason)
            assert block.tuning.after <= block.tuning.before
