"""A run whose process is killed while the gradient passes back goes on, and writes the same bytes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from astro_dist import pipeline
from astro_dist.report.status import read_status
from tests.support.models import files_of

ROOT = Path(__file__).parents[2]
LOSS = {"calibration__token_weights": "loss", "calibration__chunk_samples": 2}
RUN_AND_DIE = """
import os, signal, sys
from pathlib import Path
from astro_dist import pipeline
from astro_dist.config.schema import RunConfig
from astro_dist.run_directory.records import RunDirectory
from astro_dist.worker.hidden_states import HiddenStates
from astro_dist.worker.worker import Worker

owner = {"HiddenStates": HiddenStates, "RunDirectory": RunDirectory, "Worker": Worker}[sys.argv[2]]
real = getattr(owner, sys.argv[3])

def dying(*args, **kwargs):
    if all(word in map(str, args) for word in sys.argv[4:]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

setattr(owner, sys.argv[3], dying)
pipeline.quantize(RunConfig.model_validate_json(Path(sys.argv[1]).read_text()))
"""
"""Runs a configuration, and dies as soon as a function is called with some words among its arguments."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        ("HiddenStates", "save", "gradient", "3", "c0002"),  # norm and head have begun to hand gradients on
        ("HiddenStates", "save", "gradient", "1", "c0001"),  # the energies are written, the gradient is not
        ("RunDirectory", "finish", "weights-0001"),  # the weights are written, their record is not
        ("Worker", "open_block"),  # all weights are there
    ],
    ids=" ".join,
)
def test_process_killed_in_the_backward_wave_goes_on(run_config, tmp_path, place):
    pipeline.quantize(run_config(output__dir=str(tmp_path / "whole"), **LOSS))
    config, plain = run_config(**LOSS), tmp_path / "config.json"
    plain.write_text(config.model_dump_json())
    died = subprocess.run(
        [sys.executable, "-c", RUN_AND_DIE, str(plain), *place],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    records = tmp_path / "run" / "records"
    before = {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}
    pipeline.quantize(run_config(execution__workers=2, **LOSS))
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "whole" / "model")
    after = {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert before.items() <= after.items(), "a finished unit was done again"
    assert read_status(tmp_path / "run").state == "complete"
