"""The pack-quantized layout against the library that defines it."""

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

from astro.config import Quantization
from astro.errors import CheckpointError
from astro.formats import compressed_tensors as ct
from astro.grid import fit_grid
from astro.layer import QuantizedLinear
from tests.conftest import random_weights


def linear(settings, rows=16, columns=64):
    W = random_weights(rows, columns)
    grid = fit_grid(W, settings, torch.float16)
    return QuantizedLinear(grid.quantize(W), grid)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_round_trip(bits, symmetric, group_size):
    settings = Quantization(bits=bits, symmetric=symmetric, group_size=group_size)
    before = linear(settings)
    tensors = ct.pack_linear("m.q", before, torch.float16)
    assert set(tensors) == {f"m.q.{suffix}" for suffix in ct.suffixes(settings)}
    after = ct.unpack_linear("m.q", tensors, settings)
    assert torch.equal(after.Q, before.Q)
    assert torch.equal(after.dequantize(), before.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_against_the_librarys_own_compressor(bits, symmetric, group_size):
    settings = Quantization(bits=bits, symmetric=symmetric, group_size=group_size)
    quantized = linear(settings)
    state = {"weight": quantized.dequantize(), "weight_scale": quantized.grid.scale}
    if not symmetric:
        state["weight_zero_point"] = quantized.grid.zero.to(torch.int8)
    weights = ct.quantization_config(settings, [])["config_groups"]["group_0"]["weights"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    expected = PackedQuantizationCompressor.compress(state, scheme)
    found = {name.removeprefix("m."): t for name, t in ct.pack_linear("m", quantized, torch.float32).items()}
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layout_is_exact():
    tensors = ct.pack_linear("m.q", linear(Quantization(group_size=32, symmetric=False)), torch.bfloat16)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert found == {
        "m.q.weight_packed": (torch.int32, (16, 8)),
        "m.q.weight_scale": (torch.bfloat16, (16, 2)),
        "m.q.weight_shape": (torch.int64, (2,)),
        "m.q.weight_zero_point": (torch.int32, (2, 2)),
    }


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_config_is_accepted_by_the_library(group_size, symmetric):
    settings = Quantization(group_size=group_size, symmetric=symmetric)
    parsed = QuantizationConfig.model_validate(ct.quantization_config(settings, ["lm_head"]))
    weights = parsed.config_groups["group_0"].weights
    assert (weights.num_bits, weights.symmetric, parsed.ignore) == (4, symmetric, ["lm_head"])
    assert weights.group_size == (32 if group_size == 32 else None)


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
    settings = Quantization(group_size=32)
    tensors = ct.pack_linear("m.q", linear(settings), torch.float16)
    tensors.pop(f"m.q.{suffix}") if tensor is None else tensors.update({f"m.q.{suffix}": tensor})
    with pytest.raises(CheckpointError, match=message):
        ct.unpack_linear("m.q", tensors, settings)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"group_size": 128}, None),
        ({"bits": 3, "group_size": 128}, "no server has a kernel"),
        ({"group_size": 96}, "group size 96"),
        ({"symmetric": False}, "asymmetric"),
    ],
)
def test_what_servers_refuse_is_said(changes, note):
    notes = ct.server_notes(Quantization(**changes))
    assert (note is None and not notes) or any(note in text for text in notes)
