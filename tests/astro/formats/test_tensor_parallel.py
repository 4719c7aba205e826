"""Over how many GPUs vLLM can cut layers whose columns have groups, and attention that has heads."""

from types import SimpleNamespace

import pytest
from transformers import FalconConfig, GPT2Config, LlamaConfig

from astro.config import LayerScheme
from astro.formats.tensor_parallel import tensor_parallel_limit
from astro.model.head_counts import HeadCounts, head_counts
from astro.model.linear_layer import LinearLayer

MANY = HeadCounts((64,), (8,))


def limit_of(columns, group_size, heads=MANY):
    layers = [LinearLayer.plain(name, f"{name}.weight", 64, inputs) for name, inputs in columns.items()]
    return tensor_parallel_limit(layers, {name: [LayerScheme(group_size=group_size)] for name in columns}, heads)


@pytest.mark.parametrize(
    ("columns", "group_size", "sizes", "next_size"),
    [
        (29568, 128, (1,), 2),  # Qwen2.5-72B: 231 groups
        (29568, 64, (1, 2), 4),
        (29568, 32, (1, 2, 4), 8),
        (1536, 128, (1, 2, 4), 8),  # experts of Qwen3-235B: 12 groups
        (14336, 128, (1, 2, 4, 8, 16), 32),
        (29568, -1, (1, 2, 4, 8, 16, 32, 64), 0),
    ],
)
def test_inputs_on_each_gpu_are_a_multiple_of_the_group_size(columns, group_size, sizes, next_size):
    limit = limit_of({"a.mlp.down_proj": columns, "a.o_proj": 8192}, group_size)
    assert (limit.sizes, limit.next_size) == (sizes, next_size)
    words = limit.in_words
    if next_size:
        assert f"limited by groups: {next_size} would cut some of a.mlp.down_proj, which has {columns} inputs" in words
        assert ("smaller group size" in words) == (sizes[-1] < 8 and group_size > 32)
    else:
        assert "is 64 (smaller ones: 1, 2, 4, 8, 16, 32), limited by heads: the model has 64" in words


@pytest.mark.parametrize(
    ("heads", "sizes"),
    [
        (HeadCounts((28,), (4,)), (1, 2, 4, 28)),  # Qwen2.5-7B: 7 and 14 GPUs would not share 4 heads of keys evenly
        (HeadCounts((9,), (3,)), (1, 3, 9)),  # SmolLM2-135M
        (HeadCounts((40,), (10,)), (1, 2, 5, 10, 20, 40)),  # Phi-4
        (HeadCounts((12,)), (1, 2, 3, 4, 6, 12)),
        (HeadCounts((24, 32), (8,)), (1, 2, 4, 8)),
        (HeadCounts((25,), (1,)), (1, 5, 25)),
        (HeadCounts(), (1, 2, 4, 8, 16, 32, 64)),
    ],
)
def test_each_gpu_has_equally_many_heads(heads, sizes):
    limit = limit_of({"a.down_proj": 64 * 7 * 9 * 25 * 128}, 128, heads)
    assert (limit.sizes, limit.size, limit.layer) == (sizes, sizes[-1], None)
    assert ("limited by heads" in limit.in_words) == bool(heads.attention)


def test_groups_may_allow_sizes_that_are_no_power_of_two():
    limit = limit_of({"a.down_proj": 3 * 5 * 32}, 32, HeadCounts((30,)))
    assert (limit.sizes, limit.next_size, limit.layer) == ((1, 3, 5, 15), 30, "a.down_proj")


def test_inputs_without_groups_are_divided_evenly_too():
    limit = limit_of({"a.down_proj": 96}, -1)
    assert limit.sizes == (1, 2, 4, 8, 16, 32)
    assert limit.in_words.endswith(": the 96 inputs of a.down_proj are no multiple of 64")


def test_layers_that_are_cut_along_their_outputs_set_no_limit():
    assert limit_of({"a.q_proj": 96, "a.up_proj": 96}, 32).size == 64
    assert limit_of({"a.experts.0.w2": 96, "a.q_proj": 96}, 32).size == 1


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(hidden_size=3584, num_attention_heads=28, num_key_value_heads=4), HeadCounts((28,), (4,))),
        (LlamaConfig(num_attention_heads=8, num_key_value_heads=8), HeadCounts((8,))),
        (GPT2Config(n_head=12), HeadCounts((12,))),
        (FalconConfig(hidden_size=4544, num_attention_heads=71, multi_query=True), HeadCounts((71,), (1,))),
        (LlamaConfig(num_key_value_heads=2).get_text_config(), HeadCounts((32,), (2,))),
    ],
)
def test_heads_are_read_off_the_config(config, expected):
    assert head_counts(config) == expected


def test_heads_that_differ_by_block_count_all():
    config = SimpleNamespace(num_attention_heads=[32, 0, 24], num_key_value_heads=[8, None, 8])
    assert head_counts(config) == HeadCounts((24, 32), (8,))
