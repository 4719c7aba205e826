"""A run whose innermost loops are really compiled. On a CPU it comes to the very same bytes."""

from pathlib import Path

import pytest

from astro import fusion
from astro_dist import pipeline
from tests.architectures import EXPERTS
from tests.conftest import files_of, write_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_compiled_run_comes_to_the_same_bytes(run_config, tmp_path):
    source = str(write_checkpoint(tmp_path / "mixtral", EXPERTS["mixtral"]))
    changes = {"model__source": source, "quantization__group_size": 16}
    plain, compiled = (
        pipeline.quantize(run_config(**changes, execution__compile=on, output__dir=str(tmp_path / str(on))))
        for on in (False, True)
    )
    assert fusion.is_enabled()
    fusion.enable(False)
    assert files_of(Path(compiled["model"])) == files_of(Path(plain["model"]))
