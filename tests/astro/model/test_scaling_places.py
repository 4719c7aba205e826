"""Where the factors of an input can go: found in the forward of blocks of many kinds, and in small blocks by hand."""

import pytest
import torch
from torch import nn

from astro.model.block_call import BlockState, forward
from astro.model.differences import largest_difference
from astro.model.recording import count_outputs, record
from astro.model.scaling_places import Reader, Trial
from astro.model.skeleton import Skeleton
from astro.storage.checkpoint import Checkpoint
from tests.support.architectures import DENSE, EXPERTS
from tests.support.models import write_checkpoint

IDS = torch.arange(24).reshape(1, 24)
MODELS = DENSE | EXPERTS


@torch.no_grad()
def trial_of(name, tmp_path, dtype=torch.float64):
    folder = write_checkpoint(tmp_path / "model", MODELS[name])
    skeleton, checkpoint = Skeleton(folder, dtype), Checkpoint.open(folder)
    skeleton.load(skeleton.model, checkpoint.read(checkpoint.entries), torch.device("cpu"))
    skeleton.tie()
    hidden, calls = record(skeleton, IDS, count_outputs(skeleton, IDS))
    block = skeleton.blocks[0]
    return Trial(block, lambda: forward(block, BlockState(hidden), calls[0]))


@torch.no_grad()
def norms(trial):
    return {place.name: ([reader.parameter for reader in place.readers], place) for place in trial.norms()}


@pytest.mark.parametrize(
    ("name", "norm", "readers", "offset"),
    [
        ("llama", "input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], 0),
        ("gemma3", "pre_feedforward_layernorm", ["mlp.gate_proj", "mlp.up_proj"], 1),
        ("opt", "final_layer_norm", ["fc1"], 0),
        ("gpt2", "ln_2", ["mlp.c_fc"], 0),
        ("cohere", "input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj",
                                       "mlp.up_proj"], 0),
        ("falcon", "input_layernorm", ["self_attention.query_key_value", "mlp.dense_h_to_4h"], 0),
        ("mixtral", "post_attention_layernorm", ["mlp.gate", "mlp.experts.gate_up_proj"], 0),
        ("qwen2-moe", "post_attention_layernorm", ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj",
            "mlp.gate", "mlp.experts.gate_up_proj", "mlp.shared_expert_gate"], 0),
        ("gpt-oss", "post_attention_layernorm", ["mlp.router", "mlp.experts.gate_up_proj"], 0),
        ("deepseek-v3", "self_attn.kv_a_layernorm", ["self_attn.kv_b_proj"], 0),
        ("qwen3-next", "input_layernorm", ["linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"], 1),
    ],
)  # fmt: skip
def test_all_that_read_a_norm_are_found(name, norm, readers, offset, tmp_path):
    found, place = norms(trial_of(name, tmp_path))[norm]
    assert sorted(parameter.removesuffix(".weight") for parameter in found) == sorted(readers)
    assert place.gains == {f"{norm}.weight": offset}
    assert place.biases == ((f"{norm}.bias",) if name in ("opt", "gpt2", "falcon") else ())


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "olmo2"])
def test_norms_of_heads_and_behind_layers_are_left_alone(name, tmp_path):
    places = norms(trial_of(name, tmp_path))
    assert not any(word in place for place in places for word in ("q_norm", "k_norm", "post_feedforward", "post_attn"))
    assert ("post_attention_layernorm" in places) == (name == "qwen3")


def naive_rows(num_heads, num_shared, size):
    """Row of the values that each channel of the attention's output is made of."""
    return [(head // (num_heads // num_shared)) * size + i for head in range(num_heads) for i in range(size)]


@pytest.mark.parametrize(
    ("name", "reader", "into", "first", "rows"),
    [
        ("llama", "self_attn.o_proj", "self_attn.v_proj", 0, naive_rows(4, 2, 16)),
        ("qwen2", "self_attn.o_proj", "self_attn.v_proj", 0, naive_rows(4, 2, 16)),
        ("phi3", "self_attn.o_proj", "self_attn.qkv_proj", 96, naive_rows(4, 2, 16)),
        ("falcon", "self_attention.dense", "self_attention.query_key_value", 80, naive_rows(4, 1, 16)),
        ("opt", "self_attn.out_proj", "self_attn.v_proj", 0, list(range(64))),
        ("llama", "mlp.down_proj", "mlp.up_proj", 0, list(range(128))),
        ("gemma3", "mlp.down_proj", "mlp.up_proj", 0, list(range(128))),
        ("phi3", "mlp.down_proj", "mlp.gate_up_proj", 128, list(range(128))),
        ("glm4", "mlp.down_proj", "mlp.gate_up_proj", 128, list(range(128))),
    ],
)
@torch.no_grad()
def test_rows_that_make_an_input_are_found(name, reader, into, first, rows, tmp_path):
    place = trial_of(name, tmp_path).linear(f"{reader}.weight")
    assert place.name == into
    assert place.weight == Reader(f"{into}.weight", 0)
    assert place.rows.tolist() == [first + row for row in rows]
    assert place.readers == (Reader(f"{reader}.weight", 1),)
    assert bool(place.biases) == (name in ("qwen2", "opt") or (name, reader) == ("glm4", "self_attn.o_proj"))


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "llama4"])
@torch.no_grad()
def test_rows_of_experts_are_found(name, tmp_path):
    experts = "feed_forward.experts" if name == "llama4" else "mlp.experts"
    place = trial_of(name, tmp_path).linear(f"{experts}.down_proj")
    width = 32 if name == "qwen3-moe" else 128
    assert place.rows.tolist() == list(range(width, 2 * width)), "up lies behind gate"
    assert place.weight == Reader(f"{experts}.gate_up_proj", 2 if name == "llama4" else 1)
    assert place.readers == (Reader(f"{experts}.down_proj", 1 if name == "llama4" else 2),)


@torch.no_grad()
def test_experts_with_limits_and_biases_take_nothing(tmp_path):
    assert trial_of("gpt-oss", tmp_path).linear("mlp.experts.down_proj") is None


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("opt", "fc2"),  # ReLU
        ("gpt-neox", "mlp.dense_4h_to_h"),  # GELU
        ("gpt-neox", "attention.dense"),  # values lie between queries and keys, head by head
        ("olmo2", "self_attn.q_proj"),  # reads the residual
    ],
)
@torch.no_grad()
def test_nothing_goes_through_what_is_not_linear(name, reader, tmp_path):
    assert trial_of(name, tmp_path).linear(f"{reader}.weight") is None


@torch.no_grad()
def test_16_bits_are_enough_to_find_places(tmp_path):
    trial = trial_of("llama", tmp_path, torch.bfloat16)
    assert set(norms(trial)) == {"input_layernorm", "post_attention_layernorm"}
    assert trial.linear("self_attn.o_proj.weight").rows.tolist() == naive_rows(4, 2, 16)


class _Norm(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.scale, self.form = nn.Parameter(torch.rand(8, dtype=torch.float64)), form

    def forward(self, x):
        return self.form(x / x.square().mean(-1, keepdim=True).sqrt(), self.scale)


class _Block(nn.Module):
    def __init__(self, form=lambda n, w: n * w, use=lambda x, n, y: x + y):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.layer, self.use = _Norm(form), nn.Linear(8, 8, dtype=torch.float64), use

    def forward(self, x):
        n = self.norm(x)
        return self.use(x, n, self.layer(n))


@torch.no_grad()
def places_of(block):
    hidden = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Trial(block, lambda: BlockState(block(hidden))).norms()


@pytest.mark.parametrize(("form", "offset"), [(lambda n, w: n * w, 0), (lambda n, w: n * (1 + w), 1),
                                              (lambda n, w: n * (w - 0.5), -0.5)])  # fmt: skip
def test_form_of_a_gain_is_measured(form, offset):
    (place,) = places_of(_Block(form))
    assert place.gains == {"norm.scale": pytest.approx(offset)}


@pytest.mark.parametrize("form", [lambda n, w: n * w.square(), lambda n, w: n * w.sigmoid(), lambda n, w: n + w])
def test_what_is_no_gain_takes_nothing(form):
    assert places_of(_Block(form)) == []


@pytest.mark.parametrize(
    "use",
    [
        lambda x, n, y: n + y,  # the residual is behind the norm
        lambda x, n, y: x + y * n,
        lambda x, n, y: x + y + n.mean(-1, keepdim=True),
        lambda x, n, y: x + torch.einsum("bth,th->bt", n, n[0])[..., None],
    ],
)
def test_norm_that_something_else_reads_takes_nothing(use):
    assert places_of(_Block(use=use)) == []


def test_states_differ_by_their_largest_difference_in_anything_that_is_passed_on():
    hidden, key = torch.ones(1, 2, 2), torch.full((2,), 4.0)
    state = BlockState(hidden, {"key": key})
    assert largest_difference(state, state) == 0
    assert largest_difference(BlockState(hidden, {"key": key * 1.5}), state) == 0.5
    assert largest_difference(BlockState(hidden), state) == float("inf")
    assert largest_difference(BlockState(hidden, {"key": key * float("nan")}), state) == float("inf")
