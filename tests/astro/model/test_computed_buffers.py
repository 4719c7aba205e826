"""Buffers that no file holds get the values that the whole model has, or are refused."""

from typing import Any

import pytest
import torch
import transformers
from transformers import initialization

from astro.errors import UnsupportedError
from astro.model.computed_buffers import fill_buffers
from astro.model.skeleton import Skeleton
from tests.support.architectures import IDS, logits_of, streamed_logits
from tests.support.models import LLAMA, write_checkpoint

CPU = torch.device("cpu")
FALCON_H1: Any = transformers.FalconH1Config(
    **LLAMA, mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1,
    mamba_chunk_size=16, ssm_multipliers=[0.5, 2.0, 3.0, 0.7, 1.5],
)  # fmt: skip


@pytest.fixture
def dirty_memory(monkeypatch):
    """Let fresh tensors hold nonsense, as memory that was used before does."""
    fresh = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: fresh(tensor, **options).fill_(77))


def test_buffer_that_only_the_models_initializer_fills_is_as_in_the_whole_model(tmp_path, dirty_memory):
    folder = write_checkpoint(tmp_path / "source", FALCON_H1)
    expected, _ = logits_of(folder, IDS)
    assert torch.equal(streamed_logits(folder, IDS, tmp_path), expected)


def test_buffer_of_a_block_that_nothing_fills_is_refused_by_its_name(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "source", FALCON_H1)
    monkeypatch.setattr(transformers.FalconH1PreTrainedModel, "_init_weights", lambda self, module: None)
    skeleton = Skeleton(folder, torch.float32)
    with pytest.raises(UnsupportedError, match=r"buffer model\.layers\.1\.mamba\.mup_vector \[1, 1, .*no initializer"):
        fill_buffers(skeleton.model, skeleton.blocks[1], CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_buffer_that_is_filled_in_part_is_refused(llama, dtype, monkeypatch):
    skeleton = Skeleton(llama, torch.float32)
    block = skeleton.blocks[0]
    block.register_buffer("table", torch.empty(4, dtype=dtype, device="meta"), persistent=False)

    def fill(module):
        if module is block:
            module.table[:filled] = 1

    monkeypatch.setattr(skeleton.model, "_init_weights", fill)
    monkeypatch.setattr(type(skeleton.model.model), "_init_weights", lambda self, module: fill(module))
    filled = 3
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.table \[4\]"):
        fill_buffers(skeleton.model, block, CPU)
    block.table = torch.empty(4, dtype=dtype, device="meta")
    filled = 4
    fill_buffers(skeleton.model, block, CPU)
    assert bool((block.table == 1).all())


def test_initializers_leave_what_is_loaded_alone(tmp_path):
    folder = write_checkpoint(tmp_path / "source", FALCON_H1)
    skeleton = Skeleton(folder, torch.float32)
    skeleton.model.model.embed_tokens.to_empty(device="cpu")
    weight = skeleton.model.model.embed_tokens.weight
    with torch.no_grad():
        weight.fill_(5)

    class WithEmbedding(type(skeleton.model.model)):
        def _init_weights(self, module):
            super()._init_weights(module)
            if module is self:
                initialization.normal_(module.embed_tokens.weight)

    skeleton.model.model.__class__ = WithEmbedding
    fill_buffers(skeleton.model, skeleton.blocks[0], CPU)
    assert bool((weight == 5).all())
    assert not getattr(weight, "_is_hf_initialized", False)
