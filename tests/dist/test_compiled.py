"""A run whose innermost loops are really compiled: the same bytes for any number of workers."""

from pathlib import Path

import pytest

from astro import fusion
from astro_dist import pipeline
from tests.architectures import EXPERTS
from tests.conftest import files_of, write_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def plain_again():
    yield
    fusion.enable(False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_compiled_runs_of_one_worker_and_two_come_to_the_same_bytes(run_config, tmp_path):
    source = str(write_checkpoint(tmp_path / "mixtral", EXPERTS["mixtral"]))
    plain, alone, together = (
        pipeline.quantize(
            run_config(
                model__source=source, quantization__group_size=16, execution__compile=compiles,
                execution__workers=workers, output__dir=str(tmp_path / f"{compiles}-{workers}"),
            )
        )
        for compiles, workers in ((False, 1), (True, 1), (True, 2))
    )  # fmt: skip
    assert fusion.is_enabled()
    assert files_of(Path(alone["model"])) == files_of(Path(together["model"]))
    # A last bit may fall the other way, and with it a weight that lies between two points of its grid.
    assert alone["mean_relative_error"] == pytest.approx(plain["mean_relative_error"], rel=1e-3)
