"""What is read off a model about the memory of its forward."""

import copy

import pytest
import torch

from astro.model.forward_shape import ForwardShape, forward_shape
from astro.model.skeleton import Skeleton
from tests.support.architectures import DENSE, EXPERTS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", ForwardShape(heads=4)),
        ("qwen3-moe", ForwardShape(heads=4)),
        ("gemma2", ForwardShape(heads=4, window=8, is_eager=True)),
        ("gemma3", ForwardShape(heads=4, window=8)),
        ("gpt-oss", ForwardShape(heads=4, window=8, is_eager=True, has_sinks=True)),
        # A row of 64 inputs, twice 128 of gate and up, 128 activated ones and 128 products.
        ("llama4", ForwardShape(heads=4, window=32, dense_experts=4, dense_width=64 + 4 * 128)),
    ],
)
def test_eager_attention_and_dense_experts_are_recognized(tmp_path, name, expected):
    copy.deepcopy({**DENSE, **EXPERTS}[name]).save_pretrained(tmp_path)
    assert forward_shape(Skeleton(tmp_path, torch.float32)) == expected
