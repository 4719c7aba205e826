"""Which linear layers servers hold in 16 bits."""

import pytest
import torch
import transformers
from torch import nn

from astro.model.exact_layers import is_held_exact
from astro.model.skeleton import Skeleton
from astro.storage.checkpoint import Checkpoint
from tests.support.architectures import EXPERTS
from tests.support.dequantized import keys_of
from tests.support.models import write_checkpoint

SPARSE = transformers.DeepseekV32Config(
    **{**EXPERTS["deepseek-v3"].to_diff_dict(), "model_type": "deepseek_v32"},
    index_n_heads=4, index_head_dim=16, index_topk=8,
)  # fmt: skip
FIRST_MAMBA = transformers.JambaConfig(
    vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_experts=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=16,
    pad_token_id=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "exact", "quantized"),
    [
        (SPARSE, {"indexer.wk", "indexer.weights_proj"}, {"indexer.wq_b", "self_attn.o_proj"}),
        (FIRST_MAMBA, {"mamba.in_proj", "mamba.x_proj", "mamba.dt_proj", "mamba.out_proj"}, {"feed_forward.up_proj"}),
        (EXPERTS["qwen3-next"], {"linear_attn.in_proj_ba"}, {"linear_attn.in_proj_qkvz", "linear_attn.out_proj"}),
    ],
    ids=["sparse attention", "first Mamba", "gated DeltaNet"],
)
def test_layers_that_servers_hold_in_16_bits_are_no_layers_to_quantize(tmp_path, config, exact, quantized):
    checkpoint, skeleton = (
        Checkpoint.open(write_checkpoint(tmp_path, config)),
        Skeleton(tmp_path, torch.float32),
    )
    layers, others = skeleton.linear_layers(0, keys_of(skeleton, checkpoint, 0))
    names, kept = {layer.name for layer in layers}, {name.removesuffix(".weight") for name in others}
    assert all(any(name.endswith(end) for name in kept) for end in exact)
    assert not any(name.endswith(tuple(exact)) for name in names)
    assert all(any(name.endswith(end) for name in names) for end in quantized)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.compressor.kv_proj", True),
        ("model.layers.0.self_attn.compressor.indexer.gate_proj", True),
        ("model.layers.0.self_attn.compressor.indexer.q_b_proj", False),
        ("model.layers.0.mlp.gate_proj", False),
        ("model.layers.0.self_attn.wk", False),
        ("model.layers.0.linear_attn.in_proj_a", True),
    ],
)
def test_names_of_layers_that_servers_hold_in_16_bits(name, expected):
    assert is_held_exact(name, nn.Module()) is expected
