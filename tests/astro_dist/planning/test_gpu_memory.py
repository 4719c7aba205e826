"""The whole solve at true sizes on a GPU without data: devices, waits, launches, and memory beside the forecast."""

import json

import pytest
import torch

from astro.calibration.starved_experts import InputStatistics
from astro.linalg import compiled
from astro.linalg.tiling import TILE_ELEMENTS, row_tiles
from astro.quantization import gptq, refine
from astro.quantization.block import quantize_block
from astro.quantization.recipe import Recipe
from astro_dist.planning.cost import CostModel
from astro_dist.planning.planned_run import PlannedRun
from astro_dist.planning.predicted_groups import predicted_input_groups
from astro_dist.source.calibration_text import chunk_tokens
from tests.bench.floor import plan_of
from tests.support.fake_gpu import fake_gpu

LLAMAS = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
}
STEP = 1024
"""Columns of a group and of a block here: an eighth of the usual steps, in the same memory."""
LOOPS = ("quantization/gptq.py", "quantization/column_ops.py", "linalg/panels.py", "linalg/batching.py:add_product_")
"""Where the host must never wait, and nothing is copied between it and the GPU. A pass of refinement waits once, for
what it gained."""


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    compiled.use("kernels")
    monkeypatch.setattr(gptq, "_BLOCK", STEP)
    monkeypatch.setattr(refine, "_BLOCK", STEP)
    yield
    compiled.use("plain")


def solved(linears, settings, regularizer):
    """Solve a block of these layers on a GPU without data, all Hessians there at first, as in mode `blocks`."""
    inputs: dict[tuple[str, int], list[str]] = {}
    for linear in linears:
        stage = "out" if linear.name.endswith(("o_proj", "down_proj")) else "in"
        inputs.setdefault((linear.name.split(".")[-2] + stage, linear.columns), []).append(linear.name)
    with fake_gpu() as gpu:
        weights = {x.name: torch.empty(x.rows, x.columns, dtype=torch.bfloat16, device="cuda") for x in linears}
        known = [
            InputStatistics(tuple(names), torch.empty(columns, columns, device="cuda"), 9, 9, "none")
            for (_, columns), names in inputs.items()
        ]
        schemes = {x.name: settings.scheme(x.name, x.columns) for x in linears}
        recipe = Recipe(settings, regularizer, torch.bfloat16)
        statistics = (known.pop(0) for _ in inputs)
        quantize_block(weights, list(inputs.values()), statistics, schemes, recipe)
    return gpu


@pytest.mark.parametrize("name", LLAMAS)
def test_a_block_is_solved_on_one_device_without_waiting_and_in_the_memory_foretold(name, tmp_path, run_config):
    shape = {"num_hidden_layers": 1, "num_key_value_heads": 8, "vocab_size": 1000, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | LLAMAS[name] | shape))
    config = run_config(
        quantization__group_size=STEP, quantization__refine_passes=2, regularizer__iterations=3,
        calibration__sequence_length=8, execution__device="cuda",
    )  # fmt: skip
    plan, _ = plan_of(tmp_path, config.quantization)
    gpu = solved(plan.blocks[0].linears, config.quantization, config.regularizer)
    assert not gpu.mixed
    assert not [place for place in (*gpu.waits, *gpu.crossings) if place.startswith(LOOPS)]
    groups = predicted_input_groups(plan.blocks[0].linears, 1.0)
    tiles = sum(len(row_tiles(group.rows, group.columns, TILE_ELEMENTS["cuda"])) for group in groups)
    assert gpu.waits["quantization/refine.py:refine"] == config.quantization.refine_passes * tiles
    cost = CostModel(PlannedRun(plan, config, chunk_tokens(config.calibration), torch.bfloat16, "cuda"))
    foretold = cost.worker_bytes()
    assert 0.5 * foretold < gpu.peak_bytes <= foretold, f"{gpu.peak_bytes / 1e9:.1f} GB in {gpu.peak_place}"


def test_what_must_not_be_is_seen():
    with fake_gpu() as gpu:
        X = torch.empty(1000, 8, device="cuda")
        assert X.device.type == "cuda"
        assert X.T.contiguous().device.type == "cuda"
        with pytest.raises(RuntimeError, match="not on the expected device"):
            torch.mul(X, torch.ones(8))
        assert bool((X > 0).any())
        assert not gpu.crossings
        torch.ones(8).to("cuda")
        X[0].copy_(torch.ones(8))
        X[:, [2, 3]] = X[:, [0, 1]]  # two lists
        torch.tensor([1.0], device="cuda")
        X.to(torch.bfloat16).clone()
        assert sum(gpu.crossings.values()) == 5
        with pytest.raises(NotImplementedError, match="no data"):
            X.cpu()
    assert sum(gpu.crossings.values()) == 6
    assert sum(gpu.mixed.values()) == 1
    assert sum(gpu.waits.values()) == 1
    assert 2 * 32000 <= gpu.peak_bytes < 4 * 32000
