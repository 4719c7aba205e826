"""The counts of `tests/bench/floor.py` are those of torch, and of a walk through the columns."""

import shutil

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from astro.config import Quantization, Regularizer
from astro_dist.planning.predicted_groups import PredictedInputGroup
from tests.bench.floor import Machine, Need, count, forward_operations, shape_of, solve_needs
from tests.support.models import LLAMA, write_checkpoint

EXPERTS = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@torch.no_grad()
def test_forward_count_against_torch(llama, run_config):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager")
    hidden = torch.randn(2, 48, 64)
    rotary = model.model.rotary_emb(hidden, torch.arange(48)[None])
    with FlopCounterMode(display=False) as counter:
        model.model.layers[0](hidden, position_embeddings=rotary)
    groups, attention = shape_of(llama, run_config(), 4).blocks[0], LLAMA["hidden_size"]
    assert forward_operations(groups, attention, 2 * 48, 48, causal=False) == counter.get_total_flops()


def test_causal_attention_counts_the_pairs_that_are_not_masked():
    pairs = torch.ones(48, 48).tril().sum().item()
    assert forward_operations([], 64, 2 * 48, 48, causal=True) == 2 * 4 * 64 * pairs


def test_solve_counts_every_column_against_those_before_it():
    settings = Quantization(scale_search="minmax", refine_passes=0)
    operations = solve_needs(256, 8, settings, Regularizer(name="none"))["gptq"].exact
    assert operations == pytest.approx(sum(2 * 8 * i for i in range(256)), rel=0.05)


def test_hessians_count_half_of_a_symmetric_product(llama, run_config):
    needs = count(shape_of(llama, run_config(), 4), run_config())
    # q, k and v read 64 columns, o 64, gate and up 64, down 128; only calibration tokens count
    assert needs["hessian"].compute == 3 * 6 * 48 * (3 * 64**2 + 128**2)


@pytest.mark.parametrize("config", [transformers.LlamaConfig(**LLAMA), transformers.Qwen3MoeConfig(**EXPERTS)])
def test_config_alone_counts_what_the_weights_count(tmp_path, run_config, config):
    whole = write_checkpoint(tmp_path / "whole", config)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(whole / "config.json", bare)
    settings = run_config()
    assert count(shape_of(bare, settings, 4), settings) == count(shape_of(whole, settings, 4), settings)


def test_a_phase_takes_the_longer_of_computing_and_moving():
    machine = Machine("slow", compute=4e9, exact=1e9, rounded=2e9, bandwidth=1e8)
    assert machine.seconds(Need(compute=8e9, exact=1e9, rounded=2e9, moved_bytes=2e8)) == 4
    assert machine.seconds(Need(compute=8e9, exact=1e9, rounded=2e9, moved_bytes=5e8)) == 5


def test_groups_of_experts_count_the_tokens_that_reach_them():
    group = PredictedInputGroup(rows=64, columns=64, reach=0.5, stage="")
    assert forward_operations([group], 0, 10, 48, causal=True) == 10 * 64 * 64
