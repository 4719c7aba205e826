import pytest
import torch

from astro.activation_config import Reconstruction
from astro_dist.planning.correction_cost import correction_notes, correction_size, rounding_drifts
from astro_dist.planning.cost import CostModel
from astro_dist.planning.disk_size import DiskSize
from astro_dist.planning.planned_run import PlannedRun
from astro_dist.planning.validate import prepare
from astro_dist.schedule.calls import Reconstruct, SolveBlock, SplitBlock
from astro_dist.source.calibration_text import chunk_tokens


def cost_of(config, kind=CostModel):
    return kind(PlannedRun(prepare(config).plan, config, chunk_tokens(config.calibration), torch.float32, "cpu"))


def test_the_size_is_that_of_the_factors(run_config):
    plan = prepare(run_config()).plan
    size = correction_size(plan.blocks, Reconstruction(rank=40))
    # Of each of 3 blocks: q and o 64 × 64, k and v 64 × 32 (rank 32), gate, up and down 64 × 128.
    assert size.weights == 3 * (40 * 2 * 128 + 32 * 2 * 96 + 40 * 3 * 192)
    assert size.layer_weights == sum(layer.rows * layer.columns for unit in plan.blocks for layer in unit.linears)
    assert (size.num_layers, size.num_experts, size.size_bytes) == (21, 0, 2 * size.weights)
    nothing = correction_size(plan.blocks, Reconstruction())
    assert (nothing.num_layers, nothing.weights, nothing.num_experts) == (0, 0, 0)


def test_auto_is_foretold_at_its_most(run_config):
    plan = prepare(run_config()).plan
    most, whole = (correction_size(plan.blocks, Reconstruction(rank=rank)).weights for rank in ("auto", 512))
    assert most == whole
    assert "at most " in correction_notes(plan, Reconstruction(rank="auto"))[0]
    assert "at most " not in correction_notes(plan, Reconstruction(rank=8))[0]
    assert correction_notes(plan, Reconstruction()) == []


def test_corrections_take_time_memory_and_disk(run_config):
    configs = [run_config(reconstruction__rank=rank) for rank in (0, 64)]
    plain, corrected = map(cost_of, configs)
    assert corrected.work(SolveBlock(0, 0)).exact > plain.work(SolveBlock(0, 0)).exact
    assert corrected.work(SolveBlock(0, 0)).moved_bytes > plain.work(SolveBlock(0, 0)).moved_bytes
    assert corrected.worker_bytes() > plain.worker_bytes()
    size = correction_size(prepare(run_config()).plan.blocks, Reconstruction(rank=64)).size_bytes
    without, with_them = (cost_of(config, DiskSize).most_bytes(1) for config in configs)
    assert with_them - without == 2 * size  # block by block, and joined


@pytest.mark.parametrize("mode", ["blocks", "sequential"])
def test_a_split_block_has_a_call_for_each_batch(run_config, mode):
    changes = {"execution__mode": mode, "reconstruction__rank": 4}
    cost = cost_of(run_config(**changes))
    parts = cost.result(SplitBlock(0, 0)).batches
    assert all(batch.is_corrected for batch in parts)
    assert all(cost.work(Reconstruct(0, 0, batch.batch)).exact > 0 for batch in parts)
    assert not any(batch.is_corrected for batch in cost_of(run_config()).result(SplitBlock(0, 0)).batches)


def test_making_up_for_earlier_errors_takes_more(run_config):
    changes = {"execution__mode": "sequential", "reconstruction__rank": 4}
    aims, plain = (cost_of(run_config(quantization__compensation=share, **changes)) for share in (0.5, 0.0))
    assert aims.work(Reconstruct(0, 0, 0)).exact > plain.work(Reconstruct(0, 0, 0)).exact


@pytest.mark.parametrize(
    ("bits", "compensation", "rank", "of_experts", "of_others"),
    [(16, 1.0, 8, 0, 0), (4, 1.0, 0, 1, 1), (4, 0.0, 8, 0, 2), (4, 1.0, 8, 1, 2), (8, 1.0, 8, 1, 1)],
)
def test_matrices_about_rounding_are_counted(run_config, bits, compensation, rank, of_experts, of_others):
    config = run_config(activations__bits=bits, quantization__compensation=compensation, reconstruction__rank=rank)
    assert (rounding_drifts(config, is_corrected=False), rounding_drifts(config)) == (of_experts, of_others)
