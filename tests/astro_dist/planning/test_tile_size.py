"""`tile_weights: auto`: the largest tile that fits, from model and configuration alone."""

import pytest
import torch
import transformers
from pydantic import ValidationError

from astro.linalg.tiling import TILE_ELEMENTS
from astro.model.skeleton import Skeleton
from astro.storage.checkpoint import Checkpoint
from astro_dist.config.schema import RunConfig, run_key
from astro_dist.planning.checkpoint_plan import make_plan
from astro_dist.planning.predicted_groups import predicted_input_groups, together
from astro_dist.planning.solve_cost import SolveCost
from astro_dist.planning.tile_size import settle_tiles
from astro_dist.planning.validate import prepare
from astro_dist.planning.worker_memory import WorkerMemory
from tests.support.sparse_checkpoint import write_sparse_checkpoint

USUAL = TILE_ELEMENTS["cuda"]


@pytest.fixture(scope="module")
def block_of_671b(tmp_path_factory):
    """A function that settles the tiles of one block of a 671B, and counts the passes over experts' columns."""
    folder = tmp_path_factory.mktemp("671B") / "source"
    write_sparse_checkpoint(
        folder,
        transformers.DeepseekV3Config(
            num_hidden_layers=1, first_k_dense_replace=0, vocab_size=1000, num_nextn_predict_layers=0, dtype="bfloat16"
        ),
    )
    checkpoint = Checkpoint.open(folder)
    base = RunConfig.model_validate({"model": {"source": str(folder)}, "output": {"dir": "none"}})
    plan = make_plan(checkpoint, Skeleton(folder, torch.float32), base.quantization)

    def settled(gigabytes):
        execution = base.execution.model_copy(update={"device_memory_gb": gigabytes})
        calibration = base.calibration.model_copy(update={"chunk_samples": 2})
        config = base.model_copy(update={"execution": execution, "calibration": calibration})
        config = settle_tiles(config, plan, checkpoint)
        tile = config.execution.tile_elements("cuda")
        cost = SolveCost(config.quantization, config.regularizer, tile, "kernels")
        batches = together(predicted_input_groups(plan.blocks[0].linears, plan.expert_share), tile)
        loops = sum(len(cost.tiles(batch)) for batch in batches if batch.reach < 1)
        return tile, loops, WorkerMemory(plan, config, torch.bfloat16, "cuda").bytes(2) / 1e9

    return settled


@pytest.mark.parametrize(("gigabytes", "factor", "loops"), [(None, 1, 157), (80, 1, 157), (95, 2, 67), (141, 8, 17)])
def test_experts_of_a_671b_take_fewer_loops_on_larger_cards(block_of_671b, gigabytes, factor, loops):
    tile, counted, foretold = block_of_671b(gigabytes)
    assert (tile, counted) == (factor * USUAL, loops)
    assert factor == 1 or block_of_671b(None)[2] < foretold < 0.97 * gigabytes


def settled(run_config, **changes):
    return prepare(run_config(**{f"execution__{key}": value for key, value in changes.items()}))


def test_number_is_part_of_the_run_and_the_memory_is_not(run_config):
    configs = [
        settled(run_config, device="cuda", **changes).config
        for changes in ({"device_memory_gb": 80}, {"device_memory_gb": 141}, {"tile_weights": 8 * USUAL})
    ]
    assert [config.execution.tile_weights for config in configs] == [8 * USUAL] * 3
    assert len({run_key(config, "f", "1") for config in configs}) == 1
    usual = settled(run_config, device="cuda").config
    assert usual.execution.tile_elements("cuda") == USUAL
    assert run_key(usual, "f", "1") != run_key(configs[0], "f", "1")
    assert run_key(usual, "f", "1") == run_key(settled(run_config, device="cuda", tile_weights=USUAL).config, "f", "1")


def test_what_was_settled_is_said(run_config):
    notes = settled(run_config, device="cuda", device_memory_gb=80).notes
    assert f"execution.tile_weights: auto is {8 * USUAL}, by execution.device_memory_gb: 80" in notes
    assert not any("tile_weights" in note for note in settled(run_config, device="cuda").notes)


def test_nothing_changes_on_a_cpu(run_config):
    configs = [settled(run_config, **changes).config for changes in ({}, {"device_memory_gb": 80})]
    assert len({run_key(config, "f", "1") for config in configs}) == 1
    assert settled(run_config, tile_weights=8 * USUAL).config.execution.tile_elements("cpu") == TILE_ELEMENTS["cpu"]


@pytest.mark.parametrize("number", [0, 1 << 19, 1 << 31])
def test_tile_that_no_solve_can_have_is_refused(run_config, number):
    with pytest.raises(ValidationError, match="tile_weights: expected auto or 1048576 to 1073741824, got"):
        run_config(execution__tile_weights=number)
