"""Over how many GPUs vLLM can cut layers whose columns have groups."""

import pytest

from astro.config import LayerScheme
from astro.formats.tensor_parallel import tensor_parallel_limit
from astro.model.linear_layer import LinearLayer


def limit_of(columns, group_size):
    layers = [LinearLayer.plain(name, f"{name}.weight", 64, inputs) for name, inputs in columns.items()]
    return tensor_parallel_limit(layers, {name: [LayerScheme(group_size=group_size)] for name in columns})


@pytest.mark.parametrize(
    ("columns", "group_size", "size"),
    [
        (29568, 128, 1),  # Qwen2.5-72B: 231 groups
        (29568, 64, 2),
        (29568, 32, 4),
        (1536, 128, 4),  # experts of Qwen3-235B: 12 groups
        (14336, 128, 16),
        (29568, -1, 64),
    ],
)
def test_inputs_on_each_gpu_are_a_multiple_of_the_group_size(columns, group_size, size):
    limit = limit_of({"a.mlp.down_proj": columns, "a.o_proj": 8192}, group_size)
    assert limit.size == size
    assert all(columns % (smaller * group_size) == 0 for smaller in (1, size) if group_size > 0)
    if size < 8:
        words = f"size in vLLM is {size}: a.mlp.down_proj has {columns} inputs, {columns // group_size} groups of"
        assert words in limit.in_words
        assert "smaller group size" in limit.in_words


def test_layers_that_are_cut_along_their_outputs_set_no_limit():
    assert limit_of({"a.q_proj": 96, "a.up_proj": 96}, 32).size == 64
    assert limit_of({"a.experts.0.w2": 96, "a.q_proj": 96}, 32).size == 1
