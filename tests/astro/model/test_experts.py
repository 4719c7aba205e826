"""Statistics of experts: what the model routes to them, against a naive float64 count, and what replaces too little."""

import pytest
import torch
import transformers

from astro.calibration.block_statistics import BlockStatistics
from astro.calibration.hessian import HessianAccumulator
from astro.calibration.token_weights import TokenWeights
from astro.config import Experts
from astro.errors import CheckpointError, NumericalError, UnsupportedError
from astro.model.activations import BlockLayers
from astro.model.block_call import BlockState, forward
from astro.model.experts import expert_layers
from astro.model.recording import count_outputs, record
from astro.model.skeleton import Skeleton
from astro.storage.checkpoint import Checkpoint
from tests.support.architectures import EXPERTS, IDS
from tests.support.dequantized import keys_of
from tests.support.models import correlated_inputs, naive_hessian, write_checkpoint

GRANITE = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "shared_intermediate_size": 64, "mamba_n_heads": 8,
    "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "position_embedding_type": "nope",
}  # fmt: skip

CPU = torch.device("cpu")


class Opened:
    """The last block of a tiny model, its experts' routing noted in every forward."""

    def __init__(self, name, folder):
        checkpoint, self.skeleton = Checkpoint.open(write_checkpoint(folder, EXPERTS[name])), None
        self.skeleton = Skeleton(folder, torch.float32)
        self.skeleton.load(self.skeleton.model, checkpoint.read(checkpoint.entries), CPU)
        keys = keys_of(self.skeleton, checkpoint, 1)
        self.linears, self.others = self.skeleton.linear_layers(1, keys)
        self.layers = BlockLayers(self.skeleton.model, self.linears)
        self.hidden, self.calls = record(self.skeleton, IDS, count_outputs(self.skeleton, IDS[:1]))
        self.expert_layer = next(operand for operand in self.layers.operands if operand.expert is not None)
        self.experts = self.layers.module_of(self.expert_layer)
        for name, parameter in self.skeleton.blocks[1].named_parameters():
            if name.endswith(("router.bias", "o_proj.bias")):  # large ones send all tokens to the same experts
                parameter.data.zero_()
        self.routed = []
        self.experts.register_forward_pre_hook(lambda m, args: self.routed.append([a.clone() for a in args]))

    def forward(self):
        return forward(self.skeleton.blocks[1], BlockState(self.hidden), self.calls[1])

    def statistics(self, policy=None):
        statistics = BlockStatistics(self.layers, CPU, TokenWeights("none"))
        for _ in range(2):
            statistics.run(self.forward, "c0000")
        del self.routed[2:]
        return {known.names: known for known in statistics.finish_(policy or Experts(min_tokens=1), [self.forward])}

    def weights(self, name):
        return self.layers.weight(name).double()

    def act(self, X, *pair):
        """The input of an expert's down projection."""
        if "GptOss" in type(self.experts).__name__:
            gate, up = X @ self.weights(pair[0])[::2].T, X @ self.weights(pair[0])[1::2].T
            bias = self.experts.gate_up_proj_bias.double()[int(self.expert)]
            gate, up = (gate + bias[::2]).clamp(max=7.0), (up + bias[1::2]).clamp(-7.0, 7.0)
            return (up + 1) * gate * torch.sigmoid(1.702 * gate)
        gate, up = (X @ self.weights(name).T for name in pair)
        return torch.nn.functional.silu(gate) * up

    def assert_naive(self, known, pair, down, tokens):
        """Both Hessians of an expert are those of its module's inputs, and of what it makes of them."""
        self.expert = pair[0].split(".")[-2]
        X = tokens.double()
        Y = self.act(X, *pair)
        torch.testing.assert_close(known[pair].H.double(), naive_hessian(X), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(known[down].H.double(), naive_hessian(Y), rtol=1e-4, atol=1e-6)


def parts(known):
    """Names of an expert's gate and up, and of its down projection, for every expert."""
    experts = [names for names in known if ".experts." in names[0]]
    pairs = [names for names in experts if len(names) == 2 or names[0].endswith(".w13")]
    downs = [names for names in experts if names not in pairs]
    return list(zip(pairs, downs, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss", "longcat-flash"])
def test_each_expert_sees_what_is_routed_to_it(name, tmp_path):
    opened = Opened(name, tmp_path)
    known = opened.statistics()
    assert len(parts(known)) == 4
    for expert, (pair, down) in enumerate(parts(known)):
        X = torch.cat([args[0][(args[1] == expert).any(-1)] for args in opened.routed])
        assert known[pair].num_tokens == known[pair].routed_tokens == known[down].num_tokens == len(X)
        opened.assert_naive(known, pair, down, X)


@torch.no_grad()
def test_experts_in_one_batched_product(tmp_path):
    opened = Opened("llama4", tmp_path)
    known = opened.statistics()
    for expert, (pair, down) in enumerate(parts(known)):
        X = torch.cat([args[0].reshape(4, -1, 64)[expert] for args in opened.routed])
        assert known[pair].num_tokens == int(X.any(-1).sum())
        opened.assert_naive(known, pair, down, X[X.any(-1)])


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "llama4", "longcat-flash"])
def test_all_tokens_pass_through_a_starved_expert(name, tmp_path):
    opened = Opened(name, tmp_path)
    known = opened.statistics(Experts(min_tokens=1000, policy="all-tokens"))
    seen = []
    owner = opened.layers.owner_of(opened.expert_layer)
    owner.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 64)))
    opened.forward()
    for pair, down in parts(known):
        assert (known[pair].num_tokens, known[pair].fallback) == (40, "all-tokens")
        assert known[pair].routed_tokens < 80
        opened.assert_naive(known, pair, down, seen[0])


@torch.no_grad()
def test_starved_experts_share_a_hessian(tmp_path):
    opened = Opened("mixtral", tmp_path)
    routed = opened.statistics()
    pairs = [pair for pair, _ in parts(routed)]
    fewest = min(pairs, key=lambda pair: routed[pair].num_tokens)
    policy = Experts(min_tokens=routed[fewest].num_tokens + 1, policy="shared-hessian")
    known = opened.statistics(policy)
    total = sum(routed[pair].num_tokens for pair in pairs)
    inputs, chosen = opened.routed[0][:2]
    X = torch.cat([inputs[(chosen == expert).any(-1)] for expert in range(len(pairs))])
    assert (known[fewest].num_tokens, known[fewest].fallback) == (total, "shared-hessian")
    torch.testing.assert_close(known[fewest].H.double(), naive_hessian(X, repeats=2), rtol=1e-4, atol=1e-6)
    assert [known[pair].fallback for pair in pairs].count("shared-hessian") == 1


@torch.no_grad()
def test_starved_experts_are_rounded_or_end_the_run(tmp_path):
    opened = Opened("mixtral", tmp_path)
    known = opened.statistics(Experts(min_tokens=1000, policy="rtn"))
    assert torch.equal(known[parts(known)[0][0]].H, torch.eye(64))
    assert {statistics.fallback for statistics in known.values()} == {"", "rtn"}
    with pytest.raises(NumericalError, match=r"experts\.0\.w1\+.*w3: \d+ calibration tokens reached this expert"):
        opened.statistics(Experts(min_tokens=1000, policy="fail"))


def test_gates_are_no_linear_layers(tmp_path):
    opened = Opened("qwen2-moe", tmp_path)
    names = [name.removeprefix("model.layers.1.mlp.") for name in opened.others]
    assert names == ["gate.weight", "shared_expert_gate.weight"]
    assert not any("gate" in linear.name.split(".")[-1] and linear.rows < 5 for linear in opened.linears)


def test_experts_in_another_layout_are_refused(tmp_path, monkeypatch):
    opened = Opened("llama4", tmp_path)
    monkeypatch.setattr("astro.model.experts._UNDECLARED", {})
    with pytest.raises(UnsupportedError, match="Llama4TextExperts parameter of shape .* layout that is not known"):
        opened.skeleton.linear_layers(1, [linear.key for linear in opened.linears])


@pytest.mark.parametrize("tokens", [10, 300])
def test_inputs_that_are_kept_come_to_the_same_bits(tokens):
    chunks = correlated_inputs(3 * tokens, 40).float().chunk(3)
    sums = [HessianAccumulator(40, CPU, keep_inputs=kept) for kept in (False, True)]
    for accumulator in sums:
        for chunk in chunks:
            accumulator.add_(chunk)
    assert torch.equal(sums[0].finish_("x"), sums[1].finish_("x"))


def linear_names(config, folder):
    checkpoint, skeleton = Checkpoint.open(write_checkpoint(folder, config)), Skeleton(folder, torch.float32)
    return [layer.name for layer in skeleton.linear_layers(0, keys_of(skeleton, checkpoint, 0))[0]]


def test_layer_with_as_many_rows_as_there_are_experts_is_no_gate(tmp_path):
    """Keys and values of Qwen3-Next's published sizes have 512 rows, as many as it has experts."""
    changes = {"num_experts": 32, "shared_expert_intermediate_size": 32, "layer_types": ["full_attention"] * 2}
    config = transformers.Qwen3NextConfig(**{**EXPERTS["qwen3-next"].to_dict(), **changes})
    names = {name.removeprefix("model.layers.0.") for name in linear_names(config, tmp_path)}
    assert {"self_attn.k_proj", "self_attn.v_proj", "mlp.shared_expert.gate_proj"} <= names
    assert not {"mlp.gate", "mlp.shared_expert_gate"} & names


def test_fused_experts_keep_the_checkpoints_own_prefix(tmp_path):
    opened = Opened("llama4", tmp_path)
    name = "model.layers.1.feed_forward.experts"
    keys = {f"{name}.down_proj": f"language_model.{name}.down_proj"}
    layers = expert_layers(name, opened.experts, "down_proj", {}, keys)
    assert [layer.stem for layer in layers] == [f"language_model.{name}.{e}.down_proj" for e in range(4)]


def test_fused_experts_are_named_as_servers_ask(tmp_path):
    changes = {"layer_types": ["full_attention"] * 2, "num_local_experts": 4}
    config = transformers.GraniteMoeHybridConfig(**{**GRANITE, **changes})
    prefix = "model.layers.0.block_sparse_moe.experts."
    names = [name.removeprefix(prefix) for name in linear_names(config, tmp_path) if name.startswith(prefix)]
    assert names == [f"{e}.{part}_proj" for e in range(4) for part in ("gate", "up")] + [
        f"{e}.down_proj" for e in range(4)
    ]


def test_router_is_kept_where_experts_are_not_known(tmp_path):
    config = transformers.DbrxConfig(
        d_model=64, n_heads=4, n_layers=2, max_seq_len=128, vocab_size=260,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    )  # fmt: skip
    assert not any("router" in name for name in linear_names(config, tmp_path))


def test_experts_that_are_no_parameter_of_their_own_kind_are_refused(tmp_path):
    config = transformers.JetMoeConfig(
        vocab_size=260, hidden_size=64, num_hidden_layers=2, num_key_value_heads=2, kv_channels=16,
        intermediate_size=64, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="experts in a layout that is not known here"):
        linear_names(config, tmp_path)


def test_expert_that_is_missing_is_named(tmp_path):
    opened = Opened("mixtral", tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    keys = [key for key in keys_of(opened.skeleton, checkpoint, 1) if not key.endswith("experts.2.w1.weight")]
    with pytest.raises(CheckpointError, match="no tensor for gate_proj of expert 2"):
        opened.skeleton.linear_layers(1, keys)
