"""A run whose innermost loops are really compiled: the same bytes for any number of workers."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from astro.linalg import compiled
from astro.quantization import refine
from astro_dist import pipeline
from tests.support.architectures import EXPERTS
from tests.support.models import files_of, write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own compiler
]


@pytest.fixture(autouse=True)
def plain_again():
    yield
    compiled.use("plain")


def test_one_graph_serves_all_numbers_of_rows_and_places():
    compiled.use("compiled")
    before = counters["stats"]["unique_graphs"]
    for rows, groups, k in ((48, 5, 0), (48, 5, 1), (48, 5, 4), (64, 4, 3), (257, 9, 8), (4096, 2, 1)):
        block = refine._block(torch.zeros(1, groups * 32, rows)[:, k * 32 : k * 32 + 32])
        block.M.copy_(-torch.eye(32) - 0.1)  # a move takes a tenth of itself off what later columns want
        block.arrays.T.fill_(3.0)
        block.arrays.low.fill_(-4.0)
        block.arrays.high.fill_(3.0)
        block.settle_()
        assert bool((block.arrays.D[:, 0] == 3).all())
        assert not bool(block.arrays.D[:, -1].any())
    assert counters["stats"]["unique_graphs"] == before + 1


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
    assert compiled.is_enabled()
    assert files_of(Path(alone.model)) == files_of(Path(together.model))
    # A last bit may fall the other way, and with it a weight that lies between two points of its grid.
    assert alone.mean_relative_error == pytest.approx(plain.mean_relative_error, rel=1e-3)
