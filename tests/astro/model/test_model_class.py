"""The class of a checkpoint, and the part of it that text goes through."""

import json

import pytest
import torch
import transformers

from astro.errors import CheckpointError
from astro.model.skeleton import Skeleton
from tests.support.models import LLAMA
from tests.support.wrappers import WRAPPERS, write_model

BESIDE = {
    "qwen2.5-vl": ("model.visual",),
    "qwen3.5": ("model.visual",),
    "mistral3": ("model.vision_tower", "model.multi_modal_projector"),
    "gemma3": ("model.vision_tower", "model.multi_modal_projector"),
    "llama4": ("vision_model", "multi_modal_projector"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper_is_built_and_its_blocks_are_those_of_the_text_decoder(tmp_path, name):
    skeleton = Skeleton(write_model(tmp_path, name), torch.float32)
    assert type(skeleton.model).__name__ == WRAPPERS[name][0]
    assert skeleton.auto_class == "AutoModelForImageTextToText"
    assert skeleton.parts_beside_text == BESIDE[name]
    assert "language_model" in skeleton.blocks_name  # the vision tower is as deep
    assert "Vision" not in type(skeleton.blocks[0]).__name__


def test_text_goes_through_the_language_model_inside_a_wrapper(tmp_path):
    skeleton = Skeleton(write_model(tmp_path, "llama4"), torch.float32)
    assert type(skeleton.text_model).__name__ == "Llama4ForCausalLM"
    assert skeleton.text_model is skeleton.model.language_model


def test_plain_language_model_has_nothing_beside_text(tmp_path):
    transformers.LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    skeleton = Skeleton(tmp_path, torch.float32)
    assert (skeleton.parts_beside_text, skeleton.auto_class) == ((), "AutoModelForCausalLM")
    assert skeleton.text_model is skeleton.model


@pytest.mark.parametrize("architectures", [None, ["LlamaModel"], ["LlamaForSequenceClassification"], ["Unknown"]])
def test_class_without_a_head_for_text_is_replaced_by_one_with_it(tmp_path, architectures):
    transformers.LlamaConfig(**LLAMA).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "architectures": architectures}))
    assert type(Skeleton(tmp_path, torch.float32).model).__name__ == "LlamaForCausalLM"


def test_only_what_text_needs_must_be_covered(tmp_path):
    skeleton = Skeleton(write_model(tmp_path, "gemma3"), torch.float32)
    names = {name for name, _ in skeleton.model.named_parameters()}
    skeleton.require_covered({name for name in names if not skeleton.is_beside_text(name)})
    with pytest.raises(CheckpointError, match=r"no tensor for model\.language_model\.norm\.weight"):
        skeleton.require_covered(names - {"model.language_model.norm.weight"})
