"""The GPTQ layout against its definition, written out value by value."""

import re

import pytest
import torch

from astro.activation_config import ActivationScheme
from astro.config import LayerScheme, Override, Quantization, SolverSettings
from astro.errors import CheckpointError, ConfigError
from astro.formats import gptq_v1
from astro.quantization.grid import QuantizedLinear, fit_grid
from tests.support.models import random_weights

pytestmark = pytest.mark.usefixtures("device")


def linear(scheme, rows=32, columns=64):
    W = random_weights(rows, columns)
    grid = fit_grid(W, scheme, SolverSettings(), torch.float16, torch.ones(columns))
    return QuantizedLinear(grid.quantize(W), grid)


def read_as_defined(tensors, bits, rows, columns):
    """Weights by the formula that readers use: scale · (q − (qzeros + 1)), one bit string a column of words."""

    def values(words, count):
        bit_string = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
        return [(bit_string >> (i * bits)) & ((1 << bits) - 1) for i in range(count)]

    stored = torch.tensor([values(tensors["m.qweight"][:, row], columns) for row in range(rows)])
    zeros = torch.tensor([values(words, rows) for words in tensors["m.qzeros"]]) + 1
    group = tensors["m.g_idx"].long()
    return tensors["m.scales"].float()[group].T * (stored - zeros[group].T)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_readers_get_the_weights(bits, group_size):
    scheme = LayerScheme(bits=bits, group_size=group_size)
    before = linear(scheme)
    tensors = gptq_v1.pack_linear("m", before, torch.float16)
    assert torch.equal(read_as_defined(tensors, bits, 32, 64), before.dequantize())
    after = gptq_v1.unpack_linear("m", tensors, scheme)
    assert torch.equal(after.Q, before.Q)
    assert torch.equal(after.dequantize(), before.dequantize())


def test_layout_is_exact():
    tensors = gptq_v1.pack_linear("m", linear(LayerScheme(group_size=32)), torch.float16)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "m.qweight": (torch.int32, (8, 32)),
        "m.qzeros": (torch.int32, (2, 4)),
        "m.scales": (torch.float16, (2, 32)),
        "m.g_idx": (torch.int32, (64,)),
    }
    assert set(tensors["m.qzeros"].flatten().tolist()) == {0x77777777}


def test_config_round_trip_with_other_widths_and_layers_that_stay():
    base, other = LayerScheme(group_size=32), LayerScheme(bits=8, group_size=64)
    config = gptq_v1.quantization_config({"a.b": base, "a.bc": base, "axb": other}, ["lm_head", "a.d"], "static")
    assert (config["bits"], config["group_size"], config["desc_act"], config["sym"]) == (4, 32, False, True)
    assert gptq_v1.read_schemes(config, ["a.b", "a.bc", "axb"]) == {"a.b": base, "a.bc": base, "axb": other}
    assert [gptq_v1.is_ignored(config, name) for name in ("lm_head", "a.d", "a.b", "axd")] == [True, True, False, False]
    with pytest.raises(CheckpointError, match="dynamic excludes a.d, but it is packed"):
        gptq_v1.read_schemes(config, ["a.d"])


def vllm_override(config, name):
    """What vLLM does with a layer, which it calls by the name of the fused one: None, False (not packed) or changes."""
    for pattern, changes in config["dynamic"].items():
        if re.match(pattern[2:], name):
            return False if pattern.startswith("-:") else changes
    return None


def test_vllm_finds_the_scheme_of_fused_layers():
    base, other = LayerScheme(group_size=32), LayerScheme(bits=8, group_size=64)
    schemes = {f"m.0.attn.{name}_proj": other for name in "qkv"} | {"m.0.mlp.gate_proj": base, "m.0.mlp.up_proj": base}
    schemes |= {f"m.0.moe.experts.{e}.{name}": other for e in (0, 1) for name in ("gate_proj", "down_proj")}
    schemes |= {f"m.{i}.mlp.down_proj": base for i in range(20)}
    config = gptq_v1.quantization_config(schemes, ["m.1.attn.q_proj", "m.1.attn.k_proj", "m.1.attn.v_proj"], "static")
    changes = {"bits": 8, "group_size": 64}
    wanted = {"m.0.attn.qkv_proj": changes, "m.0.moe.experts": changes, "m.0.mlp.gate_up_proj": None,
              "m.1.attn.qkv_proj": False}  # fmt: skip
    assert {name: vllm_override(config, name) for name in wanted} == wanted
    assert gptq_v1.read_schemes(config, list(schemes)) == schemes


def test_fused_layers_of_different_schemes_are_refused():
    base, other = (LayerScheme(group_size=32),), (LayerScheme(group_size=64),)
    mixed = {"m.q_proj": base, "m.k_proj": other, "m.v_proj": base}
    assert "m.q_proj and m.k_proj and m.v_proj differ" in gptq_v1.fusion_refusal(mixed, [])
    assert "not all are quantized" in gptq_v1.fusion_refusal({"m.gate_proj": base}, ["m.up_proj"])
    assert "the experts of m.experts" in gptq_v1.fusion_refusal({"m.experts.0.w1": base, "m.experts.0.w2": other}, [])
    assert gptq_v1.fusion_refusal({"m.gate_proj": base, "m.up_proj": base, "m.down_proj": other}, []) is None
    assert "m.in_proj_qkv and m.in_proj_z differ" in gptq_v1.fusion_refusal(
        {"m.in_proj_qkv": base, "m.in_proj_z": other}, []
    )


def test_asymmetric_grids_are_refused():
    with pytest.raises(ConfigError, match="format: gptq wants symmetric: true"):
        Quantization(format="gptq", symmetric=False)
    with pytest.raises(ConfigError, match="format: gptq wants symmetric: true"):
        Quantization(format="gptq", overrides={"*": Override(symmetric=False)})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qzeros", lambda t: torch.zeros_like(t), "qzeros should say symmetric"),
        ("g_idx", lambda t: t.flip(0), "g_idx should number groups of 32 columns in order"),
        ("scales", lambda t: t[:1], r"scales should be \[2, 32\], got \[1, 32\]"),
        ("qweight", lambda t: t[:4], "expected 8 words a row"),
        ("qweight", lambda t: t[0], "should have two dimensions"),
        ("scales", None, "missing m.scales"),
    ],
)
def test_what_disagrees_is_refused(name, change, message):
    scheme = LayerScheme(group_size=32)
    tensors = gptq_v1.pack_linear("m", linear(scheme), torch.float16)
    tensor = tensors.pop(f"m.{name}")
    if change:
        tensors[f"m.{name}"] = change(tensor)
    with pytest.raises(CheckpointError, match=message):
        gptq_v1.unpack_linear("m", tensors, scheme)


def test_rows_and_columns_have_to_fill_whole_words():
    assert gptq_v1.refusal(24, 64, LayerScheme(bits=4)) is None
    assert "24 x 64 weights of 3 bits do not fill" in str(gptq_v1.refusal(24, 64, LayerScheme(bits=3)))
    assert "64 x 24 weights of 3 bits do not fill" in str(gptq_v1.refusal(64, 24, LayerScheme(bits=3)))


def test_rounded_inputs_have_no_place():
    with pytest.raises(ConfigError, match="inputs as int8 per token: the GPTQ layout cannot say so"):
        gptq_v1.quantization_config({"a": LayerScheme()}, [], "static", ActivationScheme(8, "int"))
    assert gptq_v1.read_inputs(gptq_v1.quantization_config({"a": LayerScheme()}, [], "static")) is None
