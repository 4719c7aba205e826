"""The class of a checkpoint, and the part of it that text goes through."""

import json

import pytest
import torch
import transformers

from astro.errors import CheckpointError, UnsupportedError
from astro.model.model_class import names_beside_text
from astro.model.skeleton import Skeleton
from tests.support.models import LLAMA
from tests.support.wrappers import WRAPPERS, write_model

BESIDE = {
    "qwen2.5-vl": ("model.visual",),
    "qwen3.5": ("model.visual",),
    "mistral3": ("model.vision_tower", "model.multi_modal_projector"),
    "gemma3": ("model.vision_tower", "model.multi_modal_projector"),
    "llama4": ("vision_model", "multi_modal_projector"),
    "internvl": ("model.vision_tower", "model.multi_modal_projector"),
    "glm4.5v": ("model.visual",),
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


def test_blocks_are_those_of_the_decoder_where_it_holds_the_vision_tower(tmp_path):
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    perceiver = {"resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 16}
    transformers.IdeficsConfig(
        **sizes, vocab_size=260, vision_config={**sizes, "embed_dim": 32, "image_size": 28}, perceiver_config=perceiver,
        architectures=["IdeficsForVisionText2Text"],
    ).save_pretrained(tmp_path)  # fmt: skip
    assert Skeleton(tmp_path, torch.float32).blocks_name == "model.layers"


def test_encoder_with_a_decoder_is_refused(tmp_path):
    decoder = transformers.BertConfig(vocab_size=260, hidden_size=32, intermediate_size=64, num_attention_heads=2)
    tower = transformers.ViTConfig(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tower, decoder)
    config.architectures = ["VisionEncoderDecoderModel"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="VisionEncoderDecoderModel: is an encoder with a decoder"):
        Skeleton(tmp_path, torch.float32)


def test_wrapper_that_does_not_say_what_embeds_its_tokens_is_refused(tmp_path, monkeypatch):
    def unknown(model):
        raise NotImplementedError("`get_input_embeddings` is for a subclass")

    folder = write_model(tmp_path, "gemma3")
    monkeypatch.setattr(transformers.Gemma3ForConditionalGeneration, "get_input_embeddings", unknown)
    with pytest.raises(UnsupportedError, match="which of its parts text goes through"):
        names_beside_text(transformers.Gemma3ForConditionalGeneration(transformers.AutoConfig.from_pretrained(folder)))
