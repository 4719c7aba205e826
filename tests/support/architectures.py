"""Tiny random models of the architectures that are tested, and their logits, streamed and whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.sarvam_moe.configuration_sarvam_moe import SarvamMoEConfig

from astro.model.block_call import BlockState, forward
from astro.model.call_file import load_call, save_calls
from astro.model.recording import count_outputs, record, run_head
from astro.model.skeleton import Skeleton
from astro.storage.checkpoint import Checkpoint
from tests.support.dequantized import keys_of

__all__ = ["DENSE", "EXPERTS", "IDS", "STATEFUL", "logits_of", "streamed_logits"]

IDS = torch.arange(40).reshape(2, 20) % 250

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
"""The configurations of dense models, by short name. Widths are 64 or 128, or 16 for each head."""

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
        interleave_moe_layer_step=1, pad_token_id=259,
    ),
    "qwen3-next": transformers.Qwen3NextConfig(
        **_ROUTED, num_experts=4, shared_expert_intermediate_size=32, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "sarvam-moe": SarvamMoEConfig(
        **_ROUTED, n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1,
        pad_token_id=259,
    ),
    "longcat-flash": transformers.LongcatFlashConfig(
        vocab_size=260, hidden_size=64, num_layers=2, num_attention_heads=4, ffn_hidden_size=128, q_lora_rank=32,
        kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8, head_dim=8, v_head_dim=16, moe_topk=2,
        n_routed_experts=4, zero_expert_num=2, expert_ffn_hidden_size=32, max_position_embeddings=128,
    ),
}  # fmt: skip
"""The configurations of mixtures of experts, by short name. There are four experts; LongCat has two zero experts more.
"""

_LATENT = {
    **_ROUTED, "num_key_value_heads": 4, "num_hidden_layers": 3, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "index_topk": 8, "index_head_dim": 16,
    "index_n_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "pad_token_id": 0,
}  # fmt: skip
_GEMMA4 = {
    **_HEADS, "global_head_dim": 32, "sliding_window": 8, "vocab_size_per_layer_input": 260, "pad_token_id": 0,
}  # fmt: skip

STATEFUL: dict[str, Any] = {
    "glm5": transformers.GlmMoeDsaConfig(
        **_LATENT, mlp_layer_types=["dense", "sparse", "sparse"], indexer_types=["full", "shared", "shared"]
    ),
    "hy-v4": transformers.HYV4Config(
        **{name: value for name, value in _LATENT.items() if name not in ("n_group", "topk_group")},
        bos_token_id=1, eos_token_id=2, mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "gemma4": transformers.Gemma4TextConfig(
        **_GEMMA4, layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
    ),
    "gemma4-e": transformers.Gemma4TextConfig(
        **{**_GEMMA4, "num_hidden_layers": 4}, layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2, hidden_size_per_layer_input=32,
    ),
    "deepseek-v4": transformers.DeepseekV4Config(
        **{**_ROUTED, "num_key_value_heads": 1, "num_hidden_layers": 3}, q_lora_rank=32, n_routed_experts=4,
        n_shared_experts=1, o_groups=2, o_lora_rank=16, index_n_heads=2, index_head_dim=16, index_topk=4,
        sliding_window=8, num_nextn_predict_layers=0, partial_rotary_factor=0.5,
        mlp_layer_types=["hash_moe", "moe", "moe"],
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
    ),
    "bamba": transformers.BambaConfig(
        **_WIDE, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_expand=2,
        mamba_n_groups=1,
    ),
}  # fmt: skip
"""The configurations of models whose blocks return more than hidden states, hand on more, or want more for each text.

Of GLM-5 the second and third block read the tokens that the first one's indexer chose; HY-V4 has hyper-connections
besides. Of Gemma 4's E models the last two blocks read keys and values of the first two, and every block gets an
embedding of its own. A router of DeepSeek-V4 hashes tokens.
"""


@torch.no_grad()
def streamed_logits(
    folder: Path, ids: torch.Tensor, scratch: Path, open_checkpoint: Callable[[Path], Checkpoint] = Checkpoint.open
) -> torch.Tensor:
    """Compute logits with at most one block in memory."""
    cpu = torch.device("cpu")
    checkpoint, skeleton = open_checkpoint(folder), Skeleton(folder, torch.float32)
    blocks = [keys_of(skeleton, checkpoint, i) for i in range(len(skeleton.blocks))]
    outside = [key for key in checkpoint.entries if not any(key in keys for keys in blocks)]
    skeleton.load(skeleton.model, checkpoint.read([*outside, *blocks[0]]), cpu)
    skeleton.model.tie_weights()
    num_outputs = count_outputs(skeleton, ids[:1, :4])
    skeleton.blocks[0].to("meta")
    hidden, calls = record(skeleton, ids, num_outputs)
    save_calls(scratch / "calls", calls, num_outputs)
    state = BlockState(hidden)
    for index, keys in enumerate(blocks):
        block = skeleton.blocks[index]
        skeleton.load(block, checkpoint.read(keys), cpu)
        skeleton.require_filled(block, f"block {index}")
        state = forward(block, state, load_call(scratch / "calls", index, cpu))
        block.to("meta")
    return run_head(skeleton, ids, state.hidden, num_outputs)


@torch.no_grad()
def logits_of(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Compute logits of the model as transformers loads it, and tell whether its tensors are all that it wants."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    return model(input_ids=ids, use_cache=False).logits, not any(info.values())
