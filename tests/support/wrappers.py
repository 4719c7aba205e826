"""Tiny random models with images or with layers for multi-token prediction, in the layout of the Hub's repositories."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from astro.storage.atomic import read_json, write_json
from astro.storage.checkpoint import INDEX_NAME
from tests.support.models import byte_tokenizer

__all__ = ["WITH_DRAFTER", "WRAPPERS", "write_model"]

_TEXT = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 16,
}  # fmt: skip
# As deep as the text decoder: the blocks must not be looked for in it.
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_TOWER = {"num_hidden_layers": 2, **_VISION}
_IMAGE_TOKENS = {
    "image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253,
}  # fmt: skip
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
_DEEPSEEK = {
    **_TEXT, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2,
    "moe_intermediate_size": 32, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 8,
}  # fmt: skip

_DEEPSEEK_REPOSITORY = {
    "num_nextn_predict_layers": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1,
}  # fmt: skip
"""Keys of the repository's config.json that servers read and transformers does not."""

WRAPPERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        lambda: transformers.Qwen2_5_VLConfig(
            text_config={**_TEXT, "bos_token_id": 256, "eos_token_id": 257,
                         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
            vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
                           "out_hidden_size": 64, "fullatt_block_indexes": [1]},
            **_IMAGE_TOKENS,
        ),
    ),
    "qwen3.5": (
        "Qwen3_5ForConditionalGeneration",
        lambda: transformers.Qwen3_5Config(
            text_config={**_TEXT, **_DELTA},
            vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
                           "out_hidden_size": 64, "num_position_embeddings": 16},
            **_IMAGE_TOKENS,
        ),
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        lambda: transformers.Mistral3Config(
            text_config={**_TEXT, "model_type": "mistral", "sliding_window": None},
            vision_config={**_TOWER, "model_type": "pixtral", "head_dim": 16},
            image_token_index=10, spatial_merge_size=2, vision_feature_layer=-1,
        ),
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        lambda: transformers.Gemma3Config(
            text_config={**_TEXT, "sliding_window": 8, "pad_token_id": 0},
            vision_config={**_TOWER, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4, image_token_index=250, boi_token_index=251, eoi_token_index=252,
        ),
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        lambda: transformers.Llama4Config(
            text_config={**_TEXT, "intermediate_size": 32, "intermediate_size_mlp": 128, "num_local_experts": 4,
                         "num_experts_per_tok": 1, "attention_chunk_size": 32, "interleave_moe_layer_step": 1,
                         "pad_token_id": 259},
            vision_config={**_TOWER, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
            image_token_index=250, boi_token_index=251, eoi_token_index=252,
        ),
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        lambda: transformers.InternVLConfig(
            text_config={**_TEXT, "model_type": "qwen2", "bos_token_id": 256, "eos_token_id": 257},
            vision_config={**_TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
            image_token_id=250, tie_word_embeddings=False,
        ),
    ),
    "glm4.5v": (
        "Glm4vMoeForConditionalGeneration",
        lambda: transformers.Glm4vMoeConfig(
            text_config={**_TEXT, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                         "n_shared_experts": 1, "first_k_dense_replace": 1, "use_qk_norm": False, "bos_token_id": 256,
                         "eos_token_id": 257,
                         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                                             "mrope_section": [2, 1, 1]}},
            vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
                           "image_size": 28, "out_hidden_size": 64},
            image_token_id=250, video_token_id=251, image_start_token_id=252, image_end_token_id=253,
            video_start_token_id=254, video_end_token_id=255,
        ),
    ),
}  # fmt: skip
"""The class that `architectures` names, and the configuration, of models that take images, by short name."""

WITH_DRAFTER: dict[str, tuple[str, Callable[[], Any]]] = {
    "deepseek-v3": ("DeepseekV3ForCausalLM", lambda: transformers.DeepseekV3Config(**_DEEPSEEK)),
    "qwen3.5": WRAPPERS["qwen3.5"],
}
"""The same of models whose repositories hold layers for multi-token prediction, which transformers does not build."""


def write_model(folder: Path, name: str) -> Path:
    """Write a model in one shard, with a tokenizer and the files of its processor, and return its folder."""
    class_name, make_config = {**WRAPPERS, **WITH_DRAFTER}[name]
    torch.manual_seed(0)
    model = getattr(transformers, class_name)._from_config(make_config(), dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in parameter_name else 0.0, std=0.1)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    assert not (folder / INDEX_NAME).exists()
    tensors = {_name_on_hub(name, key): tensor for key, tensor in load_file(path).items()}
    if name in WITH_DRAFTER:
        tensors |= _drafter(name, tensors)
    save_file(tensors, path, {"format": "pt"})
    if name == "deepseek-v3":
        write_json(folder / "config.json", {**read_json(folder / "config.json"), **_DEEPSEEK_REPOSITORY})
    byte_tokenizer().save_pretrained(folder)
    if name in WRAPPERS:
        for file in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
            (folder / file).write_text("{}")
    return folder


def _name_on_hub(name: str, key: str) -> str:
    """Return what the Hub's repositories call a tensor; transformers writes some under other names."""
    if name == "gemma3" and key.startswith("vision_tower.") and "vision_model" not in key:
        return key.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return key


def _drafter(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make the layers for multi-token prediction: a copy of the last block, and what joins two hidden states."""
    behind = name == "deepseek-v3"
    last = "model.layers.1." if behind else "model.language_model.layers.1."
    prefix = "model.layers.2." if behind else "mtp.layers.0."
    copied = {key.replace(last, prefix): tensor.clone() for key, tensor in tensors.items() if key.startswith(last)}
    if behind:
        norms = ("enorm", "hnorm", "shared_head.norm")
        joined = {"eh_proj.weight": torch.randn(64, 128) * 0.1} | {f"{norm}.weight": torch.ones(64) for norm in norms}
        tables = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}
        joined |= {f"{name}.weight": tensors[f"{table}.weight"].clone() for name, table in tables.items()}
        return {**copied, **{f"{prefix}{key}": tensor for key, tensor in joined.items()}}
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    joined = {"fc.weight": torch.randn(64, 128) * 0.1} | {f"{norm}.weight": torch.ones(64) for norm in norms}
    return {**copied, **{f"mtp.{key}": tensor for key, tensor in joined.items()}}
