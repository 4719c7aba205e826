"""What files hold otherwise than the model: fused, turned or renamed tensors, and configs under other names."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from astro.model.skeleton import Skeleton
from astro.storage.checkpoint import INDEX_NAME, Checkpoint
from astro_dist.planning.validate import prepare
from tests.support.architectures import EXPERTS, IDS, logits_of, streamed_logits
from tests.support.dequantized import keys_of
from tests.support.models import LLAMA, write_checkpoint

_WIDE = {"vocab_size": 260, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
_MLA = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
KIMI_LINEAR = transformers.KimiLinearConfig(
    **_WIDE, **_MLA, intermediate_size=128, num_hidden_layers=4, num_key_value_heads=4, moe_intermediate_size=32,
    n_shared_experts=1, num_experts_per_tok=2, num_local_experts=4, linear_head_dim=16, linear_num_heads=4,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
HUNYUAN = transformers.HunYuanMoEV1Config(
    **_WIDE, intermediate_size=32, num_hidden_layers=2, num_key_value_heads=2, head_dim=16, num_experts=4,
    moe_topk=[2, 1], pad_token_id=0,
)  # fmt: skip
LONGCAT = transformers.LongcatFlashConfig(
    **_WIDE, **_MLA, num_layers=2, ffn_hidden_size=128, q_lora_rank=32, head_dim=8, moe_topk=2, n_routed_experts=4,
    zero_expert_num=2, expert_ffn_hidden_size=32,
)  # fmt: skip
DEEPSEEK_V4 = transformers.DeepseekV4Config(
    **_WIDE, moe_intermediate_size=32, num_hidden_layers=3, num_key_value_heads=1, head_dim=16, q_lora_rank=32,
    num_experts_per_tok=2, n_routed_experts=4, n_shared_experts=1, o_groups=2, o_lora_rank=32, index_n_heads=2,
    index_head_dim=16, index_topk=8, sliding_window=16, num_nextn_predict_layers=0, partial_rotary_factor=0.5,
    layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
)  # fmt: skip


def layers_of(folder, index):
    checkpoint, skeleton = Checkpoint.open(folder), Skeleton(folder, torch.float32)
    keys = keys_of(skeleton, checkpoint, index)
    layers, others = skeleton.linear_layers(index, keys, {key: checkpoint.entries[key].shape for key in keys})
    return checkpoint, {layer.name: layer for layer in layers}, others


def rewrite(folder, change):
    """Write the tensors of a checkpoint again as one shard, changed."""
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    for path in (*folder.glob("*.safetensors"), folder / INDEX_NAME):
        path.unlink(missing_ok=True)
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def test_one_tensor_of_three_layers_is_cut_into_its_rows(tmp_path):
    folder = write_checkpoint(tmp_path / "m", EXPERTS["sarvam-moe"])
    checkpoint, layers, _ = layers_of(folder, 1)
    q, k, v = (layers[f"model.layers.1.self_attn.{part}_proj"] for part in "qkv")
    key = "model.layers.1.attention.query_key_value.weight"
    assert {q.key, k.key, v.key} == {key}
    assert [layer.stem for layer in (q, k, v)] == [f"model.layers.1.attention.{part}_proj" for part in "qkv"]
    fused = checkpoint.read([key])[key]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in (q, k, v):
        assert torch.equal(layer.stored(fused), model.get_submodule(layer.name).weight)
    assert torch.equal(streamed_logits(folder, IDS, tmp_path), logits_of(folder, IDS)[0])


def qwen3_vl_moe(folder):
    text = {
        **_WIDE, "intermediate_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [],
    }  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    transformers.Qwen3VLMoeForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_experts_that_files_hold_turned_are_read_turned_back(tmp_path):
    """The files of Qwen3-VL-MoE hold [E, H, 2 I]; the model has [E, 2 I, H], and loads either."""
    folders = [qwen3_vl_moe(tmp_path / name) for name in ("a", "b")]
    rewrite(folders[0], lambda tensors: tensors)
    rewrite(
        folders[1],
        lambda tensors: {
            name: t.transpose(1, 2).contiguous() if ".experts." in name else t for name, t in tensors.items()
        },
    )
    (first, ours, _), (second, theirs, _) = (layers_of(folder, 1) for folder in folders)
    experts = [name for name in ours if ".experts." in name]
    assert len(experts) == 12
    assert any(ours[name].turned != theirs[name].turned for name in experts)
    model = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(folders[1], dtype=torch.float32)
    for name in experts:
        W = theirs[name].stored(second.read([theirs[name].key])[theirs[name].key])
        assert torch.equal(W, ours[name].stored(first.read([ours[name].key])[ours[name].key]))
        assert torch.equal(W, theirs[name].view(model.get_parameter(theirs[name].parameter)))


def test_patterns_that_are_regular_expressions_are_taken_as_they_are(tmp_path):
    """DeepSeek-V4's are: `\\.experts.*.w1.weight`; its files have other names than the model."""
    folder = write_checkpoint(tmp_path / "m", DEEPSEEK_V4)
    checkpoint, layers, _ = layers_of(folder, 1)
    assert any(".ffn.experts.3.w1.weight" in key for key in checkpoint.entries)
    experts = [layer for layer in layers.values() if layer.expert is not None]
    assert len(experts) == 12
    for layer in experts:
        stored = checkpoint.read([layer.key])[layer.key]
        assert f".experts.{layer.expert}." in layer.key
        assert layer.stored(stored).shape == (layer.rows, layer.columns)
        part = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 32), "w2": ("down_proj", 0)}[layer.key.split(".")[-2]]
        assert (layer.parameter.rpartition(".")[2], layer.first) == part


def test_table_of_integers_is_not_quantized_already(run_config, tmp_path):
    """DeepSeek-V4 routes tokens by a table from tokens to experts."""
    folder = write_checkpoint(tmp_path / "m", DEEPSEEK_V4)
    tables = [name for name, entry in Checkpoint.open(folder).entries.items() if entry.dtype == "I64"]
    assert tables
    plan = prepare(run_config(model__source=str(folder))).plan
    assert {key for unit in plan.blocks for key in unit.keys} >= set(tables)


def test_vector_with_four_dimensions_is_no_expert(tmp_path):
    folder = write_checkpoint(tmp_path / "m", KIMI_LINEAR)
    _, layers, others = layers_of(folder, 0)
    assert layers
    assert not [name for name in others if name.endswith("A_log")]
    assert torch.equal(streamed_logits(folder, IDS, tmp_path), logits_of(folder, IDS)[0])


def test_number_of_chosen_experts_may_be_a_list(run_config, tmp_path):
    folder = write_checkpoint(tmp_path / "m", HUNYUAN)
    plan = prepare(run_config(model__source=str(folder))).plan
    assert plan.expert_share == 1.5 / 4


def test_block_may_count_as_two_layers(tmp_path):
    folder = write_checkpoint(tmp_path / "m", LONGCAT)
    skeleton = Skeleton(folder, torch.float32)
    assert (len(skeleton.blocks), skeleton.model.config.num_hidden_layers) == (2, 4)


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_kimi_k2_is_a_deepseek_v3(tmp_path, trust_remote_code):
    """Also where code may run: that of the tokenizer is meant, the model's is transformers' own."""
    folder = write_checkpoint(tmp_path / "m", EXPERTS["deepseek-v3"])
    expected = logits_of(folder, IDS)[0]
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k2", "auto_map": auto_map}))
    assert type(Skeleton(folder, torch.float32, trust_remote_code).model).__name__ == "DeepseekV3ForCausalLM"
    assert torch.equal(streamed_logits(folder, IDS, tmp_path), expected)


def test_model_without_conversions_is_read_as_it_is(tmp_path):
    folder = write_checkpoint(tmp_path / "m", transformers.LlamaConfig(**LLAMA))
    _, layers, _ = layers_of(folder, 0)
    assert all(layer.key == f"{layer.name}.weight" and layer.stored_first is None for layer in layers.values())
