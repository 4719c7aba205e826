"""Tiny random models of the architectures that are tested, dense and mixtures of experts."""

from typing import Any

import transformers

__all__ = ["DENSE", "EXPERTS"]

_COMMON = {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDE = {**_COMMON, "intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 128}
_HEADS = {**_WIDE, "head_dim": 16}
_ROUTED = {**_HEADS, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

DENSE: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**_WIDE),
    "llama-tied": transformers.LlamaConfig(**_WIDE, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**_WIDE),
    "qwen3": transformers.Qwen3Config(**_HEADS),
    "mistral": transformers.MistralConfig(**_WIDE, sliding_window=8),
    "gemma": transformers.GemmaConfig(**_HEADS),
    "gemma2": transformers.Gemma2Config(**_HEADS, sliding_window=8),
    "gemma3": transformers.Gemma3TextConfig(**_HEADS, sliding_window=8),
    "phi3": transformers.Phi3Config(**_WIDE, pad_token_id=0),
    "olmo2": transformers.Olmo2Config(**_WIDE),
    "cohere": transformers.CohereConfig(**_WIDE),
    "granite": transformers.GraniteConfig(**_WIDE),
    "glm4": transformers.Glm4Config(**_HEADS, pad_token_id=0),
    "starcoder2": transformers.Starcoder2Config(**_WIDE),
    "gpt-neox": transformers.GPTNeoXConfig(**_COMMON, intermediate_size=128),
    "gpt2": transformers.GPT2Config(vocab_size=260, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "opt": transformers.OPTConfig(**_COMMON, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=128),
    "falcon": transformers.FalconConfig(**_COMMON, alibi=False),
    "bloom": transformers.BloomConfig(vocab_size=260, hidden_size=64, n_layer=2, n_head=4),
}
"""By short name. Widths are 64 or 128, or 16 a head."""

EXPERTS: dict[str, Any] = {
    "mixtral": transformers.MixtralConfig(**_WIDE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": transformers.Qwen2MoeConfig(
        **_WIDE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64
    ),
    "qwen3-moe": transformers.Qwen3MoeConfig(**_ROUTED, num_experts=4),
    "olmoe": transformers.OlmoeConfig(**_WIDE, num_experts=4, num_experts_per_tok=2),
    "deepseek-v3": transformers.DeepseekV3Config(
        **_WIDE, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=2, moe_intermediate_size=32,
        q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
        first_k_dense_replace=1, n_shared_experts=1,
    ),
    "gpt-oss": transformers.GptOssConfig(
        **_HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "llama4": transformers.Llama4TextConfig(
        **_HEADS, intermediate_size_mlp=128, num_local_experts=4, num_experts_per_tok=1, attention_chunk_size=32,
        interleave_moe_layer_step=1, pad_token_id=0,
    ),
    "qwen3-next": transformers.Qwen3NextConfig(
        **_ROUTED, num_experts=4, shared_expert_intermediate_size=32, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
}  # fmt: skip
"""By short name: four experts, each of two in eight or so tokens."""
