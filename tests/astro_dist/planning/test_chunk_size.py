"""`chunk_samples: auto`: the largest chunk that fits, from model and configuration alone."""

import json

import pytest

from astro.errors import ConfigError
from astro_dist import pipeline
from astro_dist.planning import chunk_size
from astro_dist.planning.validate import prepare
from tests.support.models import files_of

AUTO = {"calibration__chunk_samples": "auto", "execution__device_memory_gb": 80}


@pytest.fixture
def needs(monkeypatch):
    """Let a worker need so many GB for a chunk of each size."""

    def let(gigabytes):
        monkeypatch.setattr(chunk_size, "_worker_bytes", lambda config, plan, checkpoint, n: gigabytes[n] * 10**9)

    return let


@pytest.mark.parametrize(("gigabytes", "settled"), [(71, 4), (400, 8), (31, 2), (22, 1)])
def test_largest_chunk_that_fits_beside_a_reserve_is_taken(run_config, needs, gigabytes, settled):
    needs({1: 21, 2: 30, 4: 68, 8: 120})
    prepared = prepare(run_config(**AUTO | {"execution__device_memory_gb": gigabytes}))
    assert prepared.config.calibration.chunk_samples == settled
    assert any(f"calibration.chunk_samples: auto is {settled}: a worker needs" in note for note in prepared.notes)


def test_too_little_for_a_single_sequence_is_refused(run_config, needs):
    needs({1: 81, 2: 90, 4: 100, 8: 120})
    with pytest.raises(ConfigError, match=r"with one sequence in a chunk a worker needs about 81.0 GB, but of"):
        prepare(run_config(**AUTO))


def test_memory_of_the_device_is_never_guessed(run_config):
    with pytest.raises(ConfigError, match=r"chunk_samples: auto wants execution.device_memory_gb, .* as 80 for an"):
        prepare(run_config(calibration__chunk_samples="auto"))


def test_number_is_part_of_the_run_and_the_memory_is_not(run_config, tmp_path):
    pipeline.quantize(run_config(**AUTO, output__dir=str(tmp_path / "auto")))
    pipeline.quantize(run_config(calibration__chunk_samples=8, output__dir=str(tmp_path / "eight")))
    assert files_of(tmp_path / "auto" / "model") == files_of(tmp_path / "eight" / "model")
    identities = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("auto", "eight")]
    assert identities[0] == identities[1]
    # Other devices may go on with the run as long as the number is the same.
    pipeline.quantize(run_config(**AUTO | {"execution__device_memory_gb": 40}, output__dir=str(tmp_path / "auto")))


def test_another_number_is_another_run(run_config, needs):
    needs({1: 21, 2: 30, 4: 68, 8: 120})
    pipeline.quantize(run_config(**AUTO))
    with pytest.raises(ConfigError, match="calibration.chunk_samples: 4 there, 2 here"):
        pipeline.quantize(run_config(**AUTO | {"execution__device_memory_gb": 40}))
