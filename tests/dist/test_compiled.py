"""A run whose innermost loops are really compiled. On a CPU it comes to the very same bytes."""

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
def test_compiled_runs_come_to_the_same_bytes(run_config, tmp_path):
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
    files = [files_of(Path(summary["model"])) for summary in (plain, alone, together)]
    assert files[0] == files[1] == files[2]
