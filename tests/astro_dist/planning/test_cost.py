"""What the cost model charges, and for what it charges nothing."""

import dataclasses
from functools import partial

import pytest
import torch

from astro_dist.planning.cost import CostModel
from astro_dist.planning.devices import DEVICES
from astro_dist.planning.planned_run import PlannedRun
from astro_dist.planning.predicted_groups import block_batches
from astro_dist.planning.solve_cost import dequantizing, packing, unpacking
from astro_dist.planning.validate import prepare
from astro_dist.planning.work import Work
from astro_dist.schedule.calls import (
    AccumulateHessians,
    Backward,
    DifferentiateLoss,
    EvaluateLoss,
    FinishEvaluation,
    Forward,
    ForwardChunk,
    LoadWeights,
    MergeHessians,
    OpenBlock,
    SolveBlock,
    SolveRows,
    TryBetas,
    WriteBlock,
)
from astro_dist.schedule.names import ORIGINAL
from astro_dist.source.calibration_text import chunk_tokens

AUTO = {"quantization__bits": "auto", "quantization__average_bits": 3.5, "execution__rounds": 2}


def cost_of(config, dtype=torch.float32, device="cpu"):
    prepared = prepare(config)
    return CostModel(PlannedRun(prepared.plan, config, chunk_tokens(config.calibration), dtype, device)), prepared.plan


def solved(config, round_index=0):
    return cost_of(config)[0].work(SolveBlock(round_index, 0))


@pytest.mark.parametrize("call", [SolveBlock, lambda r, block: MergeHessians(r, block, 0)], ids=["alone", "split"])
def test_the_first_round_of_a_width_budget_measures_every_width(run_config, call):
    cost, _ = cost_of(run_config(**AUTO))
    more = dataclasses.astuple(cost.work(call(0, 0)))
    less = dataclasses.astuple(cost.work(call(1, 0)))
    assert all(a >= b for a, b in zip(more, less, strict=True))
    assert cost.work(call(0, 0)).steps > cost.work(call(1, 0)).steps


def test_a_width_is_measured_on_sampled_rows_only(run_config):
    two, four = (run_config(**AUTO, quantization__bit_choices=widths) for widths in ([3, 4], [2, 3, 4, 8]))
    one = (solved(four).elements - solved(two).elements) / 2
    assert 0 < one < solved(four, 1).elements / 4


def test_rounding_to_nearest_factors_nothing_and_steps_through_no_column(run_config):
    plain = run_config(quantization__method="rtn", regularizer__name="none")
    work = solved(plain)
    # What is left of exact operations: the error and the energy of every row, half a product each.
    _, plan = cost_of(plain)
    figures = sum(2 * linear.columns * linear.rows * linear.columns for linear in plan.blocks[0].linears)
    assert (work.exact, work.steps, work.rounded) == (figures, 0, 0)


@pytest.mark.parametrize(
    "changes", [{"regularizer__name": "none"}, {"regularizer__beta": 0.0}, {"regularizer__beta": 0}], ids=str
)
def test_without_a_regularizer_nothing_is_inverted(run_config, changes):
    cubes = 3 * 64**3 + 128**3
    with_beta = run_config(regularizer__beta=1e-4)
    assert solved(with_beta).exact - solved(run_config(**changes)).exact == pytest.approx(cubes)


def test_a_strength_of_zero_costs_no_iteration(run_config):
    assert solved(run_config(regularizer__beta=0.0)) == solved(run_config(regularizer__name="none"))


def test_tiles_that_headers_did_not_foresee_cost_what_the_last_one_does(run_config):
    cost, _ = cost_of(run_config())
    assert cost.work(SolveRows(0, 0, 0, 99)) == cost.work(SolveRows(0, 0, 0, 0))
    assert cost.work(TryBetas(0, 0, 0, 99)) == cost.work(TryBetas(0, 0, 0, 0))


def test_what_is_written_is_packed_and_what_is_read_back_unpacked(run_config):
    cost, plan = cost_of(run_config(execution__mode="sequential"))
    linears = plan.blocks[0].linears
    weights = sum(linear.rows * linear.columns for linear in linears)
    assert cost.work(OpenBlock(0, 0)).elements == 0
    assert cost.work(OpenBlock(1, 0)).elements == unpacking(weights).elements > 0
    # Every worker reads the block back before chunks pass through it.
    assert cost.work(WriteBlock(0, 0)).elements == (packing(weights) + unpacking(weights)).elements
    assert cost.work(WriteBlock(0, 0)).moved_bytes == 4 * plan.blocks[0].written_bytes
    first, second = (cost.work(AccumulateHessians(0, stage, 0)).elements for stage in (0, 1))
    of_qkv = sum(
        linear.rows * linear.columns for linear in linears if linear.name.endswith(("q_proj", "k_proj", "v_proj"))
    )
    # The forward runs up to the stage, which is the same again for the second of two.
    assert second - 2 * first == dequantizing(of_qkv).elements


def test_rounding_to_nearest_packs_too(run_config):
    plain = run_config(quantization__method="rtn", regularizer__name="none", quantization__scale_search="minmax")
    weights = sum(linear.rows * linear.columns for linear in cost_of(plain)[1].blocks[0].linears)
    # Besides, there is a single scale to try for each group.
    assert solved(plain).elements == 4 * weights + packing(weights).elements


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_weights_that_a_gpu_reads_ahead_are_moved_while_it_solves(run_config, device):
    cost, plan = cost_of(run_config(), device=device)
    alone, foretelling = cost.work(SolveBlock(0, 0)), cost.work(SolveBlock(0, 0, following=1))
    opening = cost.work(OpenBlock(0, 1, was_foretold=True))
    read = plan.blocks[1].read_bytes
    if device == "cpu":
        assert (foretelling, opening.moved_bytes) == (alone, read)
    else:
        assert opening.moved_bytes == 0
        assert (foretelling.moved_bytes - alone.moved_bytes, foretelling.behind_bytes) == (read, read)
    assert cost.work(OpenBlock(0, 1)).moved_bytes == read


def test_states_are_moved_while_chunks_pass(run_config):
    cost, _ = cost_of(run_config())
    state = 4 * 48 * 64 * 4
    for call, states in [
        (Forward(0, 0, "c0000"), 2),
        (Forward(0, 2, "c0000"), 1),  # the last block's output is of no use
        (ForwardChunk("original", 0, "c0000", "weights-0000"), 2),
        (DifferentiateLoss("c0000"), 2),
        (Backward(0, "c0000"), 3),
    ]:
        work = cost.work(call)
        assert work.moved_bytes == work.behind_bytes == states * state
    weighed, _ = cost_of(run_config(calibration__token_weights="loss"))
    assert weighed.work(Forward(0, 0, "c0000")).moved_bytes == state, "the waves have written the outputs"
    assert weighed.work(Forward(0, 0, "h0000")).moved_bytes == 2 * 3 * 48 * 64 * 4


def test_loss_of_a_result_takes_both_models_predictions(run_config):
    cost, _ = cost_of(run_config())
    assert cost.work(EvaluateLoss("round-0")).compute == 2 * cost.work(EvaluateLoss("original")).compute > 0


def test_norm_and_head_are_read_before_their_chunks(run_config):
    cost, plan = cost_of(run_config())
    assert cost.work(LoadWeights(None, "unit")) == Work(moved_bytes=4 * plan.outside_weights)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("call", [partial(ForwardChunk, ORIGINAL, 0, "c0001", "unit"), partial(Backward, 2, "c0001")])
def test_waves_read_blocks_ahead_on_a_gpu_and_before_their_chunks_on_a_cpu(run_config, device, call):
    cost, plan = cost_of(run_config(calibration__token_weights="loss"), device=device)
    told, alone = cost.work(call(following=1)), cost.work(call())
    loading, foretold = (cost.work(LoadWeights(1, "unit", was_foretold=told)) for told in (False, True))
    read = plan.blocks[1].read_bytes
    assert loading == Work(moved_bytes=read)
    if device == "cpu":
        assert (told, foretold) == (alone, loading)
    else:
        assert foretold == Work()
        # Of the two chunks the second tells what follows.
        assert dataclasses.replace(alone, moved_bytes=told.moved_bytes, behind_bytes=told.behind_bytes) == told
        assert told.moved_bytes - alone.moved_bytes == told.behind_bytes - alone.behind_bytes == read


def test_every_call_takes_a_moment_besides_its_work(run_config):
    cost, _ = cost_of(run_config())
    assert cost.work(FinishEvaluation(0, 0)) == Work()
    assert 0 < cost.seconds(FinishEvaluation(0, 0), DEVICES["h100"]) < 0.1


def test_host_of_a_gpu_holds_the_next_block_and_states_on_their_way(run_config):
    cost, plan = cost_of(run_config(), device="cuda")
    larger, _ = cost_of(run_config(calibration__chunk_samples=6), device="cuda")
    state, libraries = 48 * 64 * 4, cost.host_bytes() - 3 * plan.blocks[0].held_bytes - 2 * 3 * 4 * 48 * 64 * 4
    assert larger.host_bytes() - cost.host_bytes() == 2 * 3 * 2 * state
    assert 1e8 < libraries < 1e9


def test_host_of_a_gpu_holds_two_shares_of_the_widest_layers_in_mode_sequential(run_config):
    alone, _ = cost_of(run_config(), device="cuda")
    for compensation, floats in (0, 0.5), ("auto", 1.5):  # half of a Hessian, and a drift
        config = run_config(execution__mode="sequential", quantization__compensation=compensation)
        shared, _ = cost_of(config, device="cuda")
        assert shared.host_bytes() - alone.host_bytes() == 2 * floats * 4 * 128**2


@pytest.mark.parametrize("call", [SolveBlock(0, 0), SolveBlock(1, 0), WriteBlock(1, 0)])
def test_the_last_round_tunes_scales(run_config, call):
    changes = {"execution__rounds": 2, "calibration__samples": 8, "calibration__chunk_samples": 2}
    plain, _ = cost_of(run_config(**changes))
    sequence = plain.work(ForwardChunk(ORIGINAL, 0, "c0000", "block")).compute / 2
    for steps, sequences in ((2, 2), (40, 8)):
        tuned, _ = cost_of(run_config(**changes, quantization__tune_steps=steps))
        more = tuned.work(call).compute - plain.work(call).compute
        assert more == pytest.approx((3 * sequences + 3.3 * steps) * sequence if call.round_index else 0.0)


@pytest.mark.parametrize(
    ("compensation", "forwards"), [("auto", 1 / 4 + 2 * (2 + 3 + 4) / 4), (0.0, (1 + 2 + 3 + 4) / 4)]
)
def test_each_stage_passes_all_chunks_up_to_it_and_those_of_the_source_where_a_drift_is_summed(
    run_config, compensation, forwards
):
    changes = {"calibration__samples": 8, "calibration__chunk_samples": 2, "quantization__compensation": compensation}
    at_once, _ = cost_of(run_config(**changes), torch.bfloat16)
    in_stages, plan = cost_of(run_config(**changes, execution__mode="stages"), torch.bfloat16)
    chunk, solve = Forward(0, 0, "c0000"), SolveBlock(0, 0)
    passed = at_once.work(ForwardChunk(ORIGINAL, 0, "c0000", "block"))
    more = in_stages.work(solve).compute - at_once.work(solve).compute
    assert more == pytest.approx(4 * forwards * passed.compute)
    sums = at_once.work(chunk).exact - passed.exact
    assert in_stages.work(chunk).exact == passed.exact, "nothing is summed while chunks pass"
    _, *later = (batch.square for batch in block_batches(plan.blocks[0].linears, 0.0, 1 << 20))
    drifts = 4 * 8 * 48 // 4 * sum(later) * 2 if compensation == "auto" else 0.0
    assert in_stages.work(solve).exact - at_once.work(solve).exact == pytest.approx(4 * sums + drifts)
