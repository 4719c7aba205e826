"""The pack-quantized layout against the library that defines it."""

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

from astro.activation_config import ActivationScheme
from astro.config import LayerScheme, Override, Quantization, SolverSettings
from astro.errors import CheckpointError
from astro.formats import compressed_tensors as ct
from astro.quantization.grid import QuantizedLinear, fit_grid
from tests.support.models import random_weights

pytestmark = pytest.mark.usefixtures("device")


def linear(scheme, rows=16, columns=64):
    W = random_weights(rows, columns)
    grid = fit_grid(W, scheme, SolverSettings(), torch.float16, torch.ones(columns))
    return QuantizedLinear(grid.quantize(W), grid)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_round_trip(bits, symmetric, group_size):
    scheme = LayerScheme(bits=bits, symmetric=symmetric, group_size=group_size)
    before = linear(scheme)
    tensors = ct.pack_linear("m.q", before, torch.float16)
    assert set(tensors) == {f"m.q.{suffix}" for suffix in ct.suffixes(scheme)}
    after = ct.unpack_linear("m.q", tensors, scheme)
    assert torch.equal(after.Q, before.Q)
    assert torch.equal(after.dequantize(), before.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_against_the_librarys_own_compressor(bits, symmetric, group_size):
    scheme = LayerScheme(bits=bits, symmetric=symmetric, group_size=group_size)
    quantized = linear(scheme)
    state = {"weight": quantized.dequantize(), "weight_scale": quantized.grid.scale}
    if not symmetric:
        state["weight_zero_point"] = quantized.grid.zero.to(torch.int8)
    weights = ct.quantization_config({"m": scheme}, [], "static")["config_groups"]["group_0"]["weights"]
    theirs = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    expected = PackedQuantizationCompressor.compress(state, theirs)
    packed = {name.removeprefix("m."): t for name, t in ct.pack_linear("m", quantized, torch.float32).items()}
    assert set(packed) == set(expected)
    assert all(torch.equal(packed[name], expected[name]) for name in expected)


def test_layout_is_exact():
    tensors = ct.pack_linear("m.q", linear(LayerScheme(group_size=32, symmetric=False)), torch.bfloat16)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert layout == {
        "m.q.weight_packed": (torch.int32, (16, 8)),
        "m.q.weight_scale": (torch.bfloat16, (16, 2)),
        "m.q.weight_shape": (torch.int64, (2,)),
        "m.q.weight_zero_point": (torch.int32, (2, 2)),
    }


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_config_is_accepted_by_the_library(group_size, symmetric):
    scheme = LayerScheme(group_size=group_size, symmetric=symmetric)
    parsed = QuantizationConfig.model_validate(ct.quantization_config({"m.q": scheme}, ["lm_head"], "static"))
    weights = parsed.config_groups["group_0"].weights
    assert (weights.num_bits, weights.symmetric, parsed.ignore) == (4, symmetric, ["lm_head"])
    assert weights.group_size == (32 if group_size == 32 else None)


@pytest.mark.parametrize(
    "inputs",
    [
        ActivationScheme(8, "int"),
        ActivationScheme(4, "int"),
        ActivationScheme(8, "float"),
        ActivationScheme(4, "int", is_static=True),
        ActivationScheme(8, "int", is_static=True),
    ],
)
def test_rounded_inputs_are_named_in_every_group_and_read_back(inputs):
    schemes = {"m.q": LayerScheme(group_size=32), "m.k": LayerScheme(bits=8)}
    config = ct.quantization_config(schemes, ["lm_head"], "static", inputs)
    parsed = QuantizationConfig.model_validate(config)
    assert config["format"] == "pack-quantized"
    assert len(parsed.config_groups) == 2
    for group in parsed.config_groups.values():
        args = group.input_activations
        strategy, is_dynamic = "tensor" if inputs.is_static else "token", not inputs.is_static
        assert (args.num_bits, args.type, args.strategy) == (inputs.bits, inputs.type, strategy)
        assert (args.dynamic, args.symmetric) == (is_dynamic, is_dynamic)
        assert not inputs.is_static or args.zp_dtype == torch.float32
    assert ct.read_inputs(config) == inputs
    assert ct.read_schemes(config, list(schemes)) == schemes
    assert ct.read_inputs(ct.quantization_config(schemes, [], "static")) is None


def test_inputs_that_are_rounded_otherwise_are_refused():
    schemes = {"m.q": LayerScheme(group_size=32), "m.k": LayerScheme(bits=8)}
    config = ct.quantization_config(schemes, [], "static", ActivationScheme(8, "int"))
    config["config_groups"]["group_1"]["input_activations"] = None
    with pytest.raises(CheckpointError, match="round the inputs of layers differently"):
        ct.read_inputs(config)
    for change, message in (
        ({"dynamic": False}, "expected .*'strategy': 'tensor'.*, got"),
        ({"dynamic": False, "strategy": "tensor", "symmetric": False, "zp_dtype": "torch.int8"}, "float32.*, got"),
        ({"dynamic": False, "type": "float"}, "between clips they are integers, got type float"),
        ({"num_bits": 6}, "got 6"),
    ):
        args = config["config_groups"]["group_0"]["input_activations"] | change
        with pytest.raises(CheckpointError, match=message):
            ct.read_inputs({"config_groups": {"group_0": {"input_activations": args}}})


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("weight_packed", None, r"missing m\.q\.weight_packed"),
        ("weight_scale", torch.ones(16, 3), r"weight_scale should be \[16, 2\], got \[16, 3\]"),
        ("weight_shape", torch.tensor([16]), "weight_shape should hold two positive sizes"),
        ("weight_packed", torch.zeros(15, 8, dtype=torch.int32), "weight_packed should have 16 rows, got 15"),
    ],
)
def test_damaged_layers_are_refused(suffix, tensor, message):
    scheme = LayerScheme(group_size=32)
    tensors = ct.pack_linear("m.q", linear(scheme), torch.float16)
    tensors.pop(f"m.q.{suffix}") if tensor is None else tensors.update({f"m.q.{suffix}": tensor})
    with pytest.raises(CheckpointError, match=message):
        ct.unpack_linear("m.q", tensors, scheme)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"group_size": 128}, None),
        ({"bits": 3, "group_size": 128}, "not tested here"),
        ({"group_size": 96}, "group size 96"),
        ({"symmetric": False}, "asymmetric"),
    ],
)
def test_what_servers_refuse_is_said(changes, note):
    notes = ct.server_notes({"m.q": [LayerScheme(**changes)]}, [])
    assert (note is None and not notes) or any(note in text for text in notes)


def mixed(overrides, names=("a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj")):
    settings = Quantization(group_size=32, overrides=overrides)
    return {name: settings.scheme(name, 128) for name in names}


def test_layers_with_schemes_of_their_own_are_named_in_the_config():
    schemes = mixed({"*.o_proj": Override(bits=8), "*.v_proj": Override(group_size=64)})
    config = ct.quantization_config(schemes, ["lm_head"], "static")
    parsed = QuantizationConfig.model_validate(config)
    read = {tuple(g.targets): (g.weights.num_bits, g.weights.group_size) for g in parsed.config_groups.values()}
    assert read == {("a.q_proj", "a.k_proj"): (4, 32), ("a.v_proj",): (4, 64), ("a.o_proj",): (8, 32)}
    assert ct.read_schemes(config, list(schemes)) == schemes
    with pytest.raises(CheckpointError, match=r"no config_group names the packed layer a\.x"):
        ct.read_schemes(config, ["a.x"])
    config["config_groups"]["group_1"]["targets"].append("a.o_proj")
    with pytest.raises(CheckpointError, match=r"two config_groups name layer a\.o_proj"):
        ct.read_schemes(config, list(schemes))


def test_layers_that_servers_fuse_and_that_differ_are_said():
    def notes_on(schemes, ignore):
        return ct.server_notes({name: [scheme] for name, scheme in schemes.items()}, ignore)

    assert not notes_on(mixed({"*.o_proj": Override(bits=8)}), ["lm_head"])
    ignored = mixed({}, ("a.q_proj", "a.v_proj"))
    for notes in (notes_on(mixed({"*.v_proj": Override(bits=8)}), []), notes_on(ignored, ["a.k_proj"])):
        assert any("a.q_proj and a.k_proj and a.v_proj differ" in note for note in notes)


def test_widths_that_are_yet_to_be_chosen_are_judged_as_possible():
    possible = {"m.q": [LayerScheme(bits=bits, group_size=96) for bits in (2, 3, 4)]}
    assert [note.partition(":")[0] for note in ct.server_notes(possible, [])] == ["2 and 3-bit weights (bits"]


def test_an_order_of_activations_is_named_where_columns_have_groups():
    schemes = {"m.q": LayerScheme(group_size=32), "m.k": LayerScheme(group_size=-1)}
    for act_order, named in (("static", ["static", None]), ("none", [None, None])):
        config = ct.quantization_config(schemes, [], act_order)
        assert [group["weights"]["actorder"] for group in config["config_groups"].values()] == named
