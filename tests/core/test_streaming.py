"""A lone block equals the same block of the whole model, for many architectures."""

import pytest
import torch
import transformers

from astro.block import BlockStatistics, forward, input_groups, input_of
from astro.checkpoint import Checkpoint
from astro.errors import CheckpointError, NumericalError, UnsupportedError
from astro.recording import load_call, record, returns_tuple, run_head, save_calls
from astro.skeleton import Skeleton
from tests.conftest import LLAMA, write_checkpoint

CPU = torch.device("cpu")
IDS = torch.arange(40).reshape(2, 20) % 250

COMMON = {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**COMMON, "intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 128}
ARCHITECTURES = {
    "llama": transformers.LlamaConfig(**LLAMA),
    "llama-tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**WIDE),
    "qwen3": transformers.Qwen3Config(**WIDE, head_dim=16),
    "mistral": transformers.MistralConfig(**WIDE, sliding_window=8),
    "gemma2": transformers.Gemma2Config(**WIDE, head_dim=16, sliding_window=8),
    "gemma3": transformers.Gemma3TextConfig(**WIDE, head_dim=16, sliding_window=8),
    "phi3": transformers.Phi3Config(**WIDE, pad_token_id=0),
    "olmo2": transformers.Olmo2Config(**WIDE),
    "cohere": transformers.CohereConfig(**WIDE),
    "granite": transformers.GraniteConfig(**WIDE),
    "starcoder2": transformers.Starcoder2Config(**WIDE),
    "gpt-neox": transformers.GPTNeoXConfig(**COMMON, intermediate_size=128),
    "opt": transformers.OPTConfig(**COMMON, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=128),
    "falcon": transformers.FalconConfig(**COMMON, alibi=False),
    "bloom": transformers.BloomConfig(vocab_size=260, hidden_size=64, n_layer=2, n_head=4),
}


def keys_of(skeleton, checkpoint, index):
    return [key for key in checkpoint.entries if skeleton.block_of(skeleton.target_of(key)[0]) == index]


@torch.no_grad()
def streamed_logits(folder, tmp_path):
    """Logits with never more than one block loaded."""
    checkpoint, skeleton = Checkpoint.open(folder), Skeleton(folder, torch.float32)
    blocks = [keys_of(skeleton, checkpoint, i) for i in range(len(skeleton.blocks))]
    outside = [key for key in checkpoint.entries if not any(key in keys for keys in blocks)]
    skeleton.load(skeleton.model, checkpoint.read([*outside, *blocks[0]]), CPU)
    skeleton.model.tie_weights()
    as_tuple = returns_tuple(skeleton, IDS[:1, :4])
    skeleton.blocks[0].to("meta")
    hidden, calls = record(skeleton, IDS, as_tuple)
    save_calls(tmp_path / "calls", calls, as_tuple)
    for index, keys in enumerate(blocks):
        block = skeleton.blocks[index]
        skeleton.load(block, checkpoint.read(keys), CPU)
        skeleton.require_filled(block, f"block {index}")
        hidden = forward(block, hidden, load_call(tmp_path / "calls", index, CPU)[0])
        block.to("meta")
    return run_head(skeleton, IDS, hidden, as_tuple)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streamed_logits_equal_the_whole_models(name, tmp_path):
    folder = write_checkpoint(tmp_path / name, ARCHITECTURES[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(streamed_logits(folder, tmp_path), expected)


def opened(folder, index=0):
    checkpoint, skeleton = Checkpoint.open(folder), Skeleton(folder, torch.float32)
    keys = keys_of(skeleton, checkpoint, index)
    linears = skeleton.linear_layers(index, keys)
    return checkpoint, skeleton, keys, linears


def test_layers_with_one_input_are_found(llama, tmp_path):
    checkpoint, skeleton, _, linears = opened(llama)
    skeleton.load(skeleton.model, checkpoint.read(checkpoint.entries), CPU)
    hidden, calls = record(skeleton, IDS, returns_tuple(skeleton, IDS[:1]))
    modules = {linear.name: skeleton.model.get_submodule(linear.name) for linear in linears}
    statistics = BlockStatistics(modules, CPU)
    seen = {}
    handle = modules["model.layers.0.mlp.down_proj"].register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    with torch.no_grad():
        for _ in range(2):
            statistics.run(lambda: forward(skeleton.blocks[0], hidden, calls[0]))
    handle.remove()
    short = [[name.rsplit(".", 1)[1] for name in group] for group in statistics.groups]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    with torch.no_grad():
        assert input_groups(modules, lambda: forward(skeleton.blocks[0], hidden, calls[0])) == statistics.groups
        down = modules["model.layers.0.mlp.down_proj"]
        found = input_of("down", down, lambda: forward(skeleton.blocks[0], hidden, calls[0]))
    assert torch.equal(found, seen["x"])
    *_, (_, H, num_tokens) = statistics.finish_()
    X = seen["x"].reshape(-1, 128)
    assert num_tokens == 80
    torch.testing.assert_close(H, X.T @ X / 40)


def test_layer_that_no_token_reached_is_an_error(llama):
    _, skeleton, _, linears = opened(llama)
    statistics = BlockStatistics({linears[0].name: skeleton.model.get_submodule(linears[0].name)}, CPU)
    with pytest.raises(NumericalError, match="q_proj: no calibration token reached"):
        list(statistics.finish_())
    with pytest.raises(NumericalError, match="q: reached by some calibration chunks, not by all"):
        input_of("q", skeleton.model.get_submodule(linears[0].name), lambda: IDS)
    with pytest.raises(NumericalError, match="q_proj: no calibration token reached"):
        input_groups({linears[0].name: skeleton.model.get_submodule(linears[0].name)}, lambda: IDS)


def test_mixture_of_experts_is_refused_by_name(tmp_path):
    config = transformers.MixtralConfig(**WIDE, num_local_experts=4)
    folder = write_checkpoint(tmp_path / "moe", config)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.mlp\.\S+ of MixtralForCausalLM"):
        opened(folder)


def test_block_without_its_tensor_is_an_error(llama):
    _, skeleton, keys, _ = opened(llama)
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.0\.self_attn\.q_proj\.weight"):
        skeleton.linear_layers(0, [key for key in keys if "q_proj" not in key])


def test_unknown_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(UnsupportedError, match="no causal language model for model_type 'nonesuch'"):
        Skeleton(tmp_path, torch.float32)


def test_code_of_a_checkpoint_does_not_run_unless_asked(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "evil.C"}}')
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedError, match="trust_remote_code: true"):
        Skeleton(tmp_path, torch.float32)
