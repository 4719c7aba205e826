"""Decoding is what the formats say: against float64, element by element, and against the libraries' own decoders."""

import contextlib
import dataclasses
import doctest
import itertools
import json
import math

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from astro.errors import CheckpointError, UnsupportedError
from astro.storage import decoding
from astro.storage.byte_store import FolderStore
from astro.storage.checkpoint import Checkpoint, require_finite
from astro.storage.source_quantization import without_quantization
from tests.support.devices import on_device
from tests.support.fake_gpu import fake_gpu
from tests.support.models import random_weights
from tests.support.quantized_sources import E2M1, fp4, fp8, integers, mxfp4_experts

BLOCKS_128 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def open_source(folder, tensors, quantization, **config):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    content = {**config, "quantization_config": quantization} if quantization else config
    (folder / "config.json").write_text(json.dumps(content))
    return Checkpoint.open_source(folder)


def decoded(folder, tensors, quantization, name="l.weight"):
    checkpoint = open_source(folder, tensors, quantization)
    W, entry = checkpoint.read([name])[name], checkpoint.entries[name]
    assert (entry.dtype, entry.shape) == ("BF16", tuple(W.shape))
    assert list(checkpoint.entries) == [name], "scales are hidden"
    assert checkpoint.size_bytes([name]) == sum(t.nbytes for t in tensors.values() if t.dtype != torch.int64)
    assert checkpoint.held_bytes([name]) == W.nbytes
    return W


def rounded(W64):
    """float64 to float32, which is how exact a product of two float32 is, and then to bfloat16."""
    return torch.from_numpy(np.ascontiguousarray(W64)).float().bfloat16()


def groups(form, **weights):
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def test_examples_in_docstrings():
    assert doctest.testmod(decoding).failed == 0


@pytest.mark.parametrize("block", [(128, 128), (16, 32), (1, 32)])
@pytest.mark.parametrize("shape", [(256, 384), (192, 576), (1, 130), (130, 1)])
def test_fp8_blocks_against_float64(tmp_path, shape, block):
    stored, W64 = fp8(random_weights(*shape), block)
    W = decoded(
        tmp_path,
        {"l.weight": stored["weight"], "l.weight_scale_inv": stored["scale"]},
        {"quant_method": "fp8", "weight_block_size": list(block)},
    )
    assert torch.equal(W, rounded(W64))


def test_fp8_blocks_against_transformers_where_no_block_is_partial(tmp_path):
    stored, _ = fp8(random_weights(256, 384), (128, 128))
    tensors = {"l.weight": stored["weight"], "l.weight_scale_inv": stored["scale"]}
    theirs = Fp8Dequantize(None)._dequantize_one(stored["weight"], stored["scale"], torch.bfloat16)
    assert torch.equal(decoded(tmp_path, tensors, BLOCKS_128), theirs)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_exponents_as_scales_of_deepseek_v4(tmp_path, as_bytes):
    stored, W64 = fp8(random_weights(192, 576), (128, 128), as_exponents=True)
    scale = stored["scale"].view(torch.uint8) if as_bytes else stored["scale"]
    W = decoded(tmp_path, {"l.weight": stored["weight"], "l.scale": scale}, BLOCKS_128)
    assert torch.equal(W, rounded(W64))


def test_4_bit_experts_of_deepseek_v4(tmp_path):
    stored, W64 = fp4(random_weights(48, 64), 32)
    scale = stored["scale"].view(torch.float8_e8m0fnu)
    W = decoded(tmp_path, {"l.weight": stored["weight"].view(torch.int8), "l.scale": scale}, BLOCKS_128)
    assert torch.equal(W, rounded(W64))
    theirs = Fp8Dequantize(None)._dequantize_one(stored["weight"].view(torch.int8), scale, torch.bfloat16)
    assert torch.equal(W, theirs)


@pytest.mark.parametrize("shape", [(), (1,), (24,), (24, 1), (1, 1), (1, 40)])
@pytest.mark.parametrize("ending", ["weight_scale", "weight_scale_inv"])
def test_fp8_by_tensor_row_or_column_against_float64(tmp_path, shape, ending):
    Q = (random_weights(24, 40) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.5
    W64 = Q.double().numpy() * (scale.double().numpy()[:, None] if shape == (24,) else scale.double().numpy())
    method = {"quant_method": "fp8", "weight_block_size": None} if "inv" in ending else {"quant_method": "fbgemm_fp8"}
    assert torch.equal(decoded(tmp_path, {"l.weight": Q, f"l.{ending}": scale}, method), rounded(W64))


@pytest.mark.parametrize("scale_shape", [(3, 1, 40), (3,), (3, 1, 1)])
def test_fused_fp8_experts_of_llama4(tmp_path, scale_shape):
    Q = (torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0)) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape, generator=torch.Generator().manual_seed(2)) + 0.5
    tensors = {"e.gate_up_proj": Q, "e.gate_up_proj_scale": scale}
    W = decoded(tmp_path, tensors, {"quant_method": "fbgemm_fp8"}, "e.gate_up_proj")
    for expert in range(3):
        assert torch.equal(W[expert], rounded(Q[expert].double().numpy() * scale[expert].double().numpy()))


def test_fused_fp8_experts_in_blocks(tmp_path):
    coded = [fp8(random_weights(48, 80, seed), (32, 32)) for seed in range(3)]
    tensors = {
        "e.down_proj": torch.stack([stored["weight"] for stored, _ in coded]),
        "e.down_proj_scale_inv": torch.stack([stored["scale"] for stored, _ in coded]),
    }
    method = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    W = decoded(tmp_path, tensors, method, "e.down_proj")
    assert torch.equal(W, rounded(np.stack([W64 for _, W64 in coded])))


def test_mxfp4_experts_against_float64_and_transformers(tmp_path):
    stored, W64 = mxfp4_experts(torch.randn(3, 64, 24, generator=torch.Generator().manual_seed(0)))
    tensors = {"e.gate_up_proj_blocks": stored["blocks"], "e.gate_up_proj_scales": stored["scales"]}
    W = decoded(tmp_path, tensors, {"quant_method": "mxfp4"}, "e.gate_up_proj")
    assert torch.equal(W, rounded(W64))
    assert torch.equal(W, convert_moe_packed_tensors(stored["blocks"], stored["scales"]))


def test_every_code_and_exponent_of_mxfp4():
    codes = decoding.float4_values(torch.arange(256, dtype=torch.uint8)[:, None])
    assert codes.tolist() == [[E2M1[byte % 16], E2M1[byte // 16]] for byte in range(256)]
    exponents = decoding.scale_values(torch.arange(256, dtype=torch.uint8))
    assert exponents[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert math.isnan(exponents[255])


def nvfp4_parts():
    stored, _ = fp4(random_weights(24, 64), 16)
    scale = (torch.rand(24, 4, generator=torch.Generator().manual_seed(3)) * 300).to(torch.float8_e4m3fn)
    codes = np.stack((stored["weight"].numpy() & 15, stored["weight"].numpy() >> 4), -1).reshape(24, 64)
    return stored["weight"], scale, np.array(E2M1)[codes], scale.double().numpy().repeat(16, 1)


def test_nvfp4_against_float64_and_compressed_tensors(tmp_path):
    packed, scale, V, S = nvfp4_parts()
    form, weights = "nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group",
                                             "group_size": 16, "symmetric": True}  # fmt: skip
    tensors = {"l.weight_packed": packed, "l.weight_scale": scale, "l.weight_global_scale": torch.tensor([768.0])}
    W = decoded(tmp_path, tensors, groups(form, **weights))
    assert torch.equal(W, rounded(V * S / 768))
    assert torch.allclose(W.float(), theirs(tensors, form, weights).float(), rtol=2**-7)


def test_nvfp4_of_modelopt_against_float64(tmp_path):
    packed, scale, V, S = nvfp4_parts()
    tensors = {"l.weight": packed, "l.weight_scale": scale, "l.weight_scale_2": torch.tensor(1 / 512)}
    tensors |= {"l.input_scale": torch.tensor(0.1)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    content = {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    checkpoint = Checkpoint.open_source(tmp_path)
    assert list(checkpoint.entries) == ["l.weight"]
    assert torch.equal(checkpoint.read(["l.weight"])["l.weight"], rounded(V * S / 512))


def theirs(tensors, form, weights):
    """What compressed-tensors makes of the tensors of a layer."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    state = {name.removeprefix("l."): tensor for name, tensor in tensors.items()}
    return BaseCompressor.get_value_from_registry(form).decompress(state, scheme)["weight"].bfloat16()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 96])
def test_packed_integers_against_float64_and_compressed_tensors(tmp_path, bits, symmetric, group):
    stored, W64 = integers(random_weights(40, 96), bits, group, symmetric)
    tensors = {f"l.{ending}": tensor for ending, tensor in stored.items()}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "group", "group_size": group} if group == 32 else {"strategy": "channel"}
    W = decoded(tmp_path, tensors, groups("pack-quantized", **weights))
    assert torch.equal(W, rounded(W64))
    assert torch.allclose(W.float(), theirs(tensors, "pack-quantized", weights).float(), rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 70, 93])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (4, True), (4, False), (5, False), (8, True)])
@pytest.mark.parametrize("in_groups", [True, False])
def test_packed_integers_whose_columns_do_not_fill_the_words(tmp_path, bits, symmetric, columns, in_groups):
    stored, W64 = integers(random_weights(40, columns), bits, 32 if in_groups else columns, symmetric)
    tensors = {f"l.{ending}": tensor for ending, tensor in stored.items()}
    form = {"strategy": "group", "group_size": 32} if in_groups else {"strategy": "channel"}
    W = decoded(tmp_path, tensors, groups("pack-quantized", num_bits=bits, type="int", **form))
    assert W.shape == (40, columns)
    assert torch.equal(W, rounded(W64))


def test_stored_shapes_are_read_once_for_layers_that_differ_by_numbers(tmp_path, monkeypatch):
    """Rows of both 13 and 14 columns are two words, so that only the stored shape tells them apart."""
    tensors, expected = {}, {}
    for layer, columns in {"b.0.e.0.up": 13, "b.1.e.12.up": 13, "b.0.e.0.down": 14}.items():
        stored, expected[f"{layer}.weight"] = integers(random_weights(8, columns), 4, columns)
        tensors |= {f"{layer}.{ending}": tensor for ending, tensor in stored.items()}
    form = groups("pack-quantized", num_bits=4, type="int", strategy="channel")
    open_source(tmp_path, tensors, form)
    read, fill = [], FolderStore.fill
    monkeypatch.setattr(FolderStore, "fill", lambda store, spans: read.extend(spans) or fill(store, spans))
    checkpoint = Checkpoint.open_source(tmp_path)
    assert sum(len(span.view) == 16 for span in read) == 2
    weights = checkpoint.read(expected)
    assert all(torch.equal(weights[name], rounded(W64)) for name, W64 in expected.items())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([8, 96], r"l.weight_packed is \[8, 10\], but its weight_shape.*96 columns of 4 bits: expected \[8, 12\]"),
        ([9, 80], r"l.weight_packed is \[8, 10\], but l.weight_shape says \[9, 80\]: expected 9 rows"),
        ([8, 0], r"l.weight_shape holds \[8, 0\]: expected rows and columns"),
        ([8], r"l.weight_shape holds \[8\]: expected rows and columns"),
    ],
)
def test_stored_shapes_that_do_not_fit(tmp_path, shape, message):
    tensors = {"l.weight_packed": torch.ones(8, 10).int(), "l.weight_scale": torch.ones(8, 1).bfloat16()}
    tensors["l.weight_shape"] = torch.tensor(shape)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path, tensors, groups("pack-quantized", num_bits=4, type="int", strategy="channel"))


def test_packed_integers_with_groups_in_another_order(tmp_path):
    stored, _ = integers(random_weights(8, 96), 4, 32)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1)) // 32
    tensors = {f"l.{ending}": tensor for ending, tensor in stored.items()} | {"l.weight_g_idx": order.int()}
    W = decoded(tmp_path, tensors, groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32))
    plain = {**tensors, "l.weight_scale": torch.ones(8, 3).bfloat16()}
    plain.pop("l.weight_g_idx")
    (tmp_path / "plain").mkdir()
    Q = decoded(
        tmp_path / "plain", plain, groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
    )
    assert torch.equal(W, rounded(Q.double().numpy() * stored["weight_scale"].double().numpy()[:, order.numpy()]))


def test_packed_integers_whose_order_is_said_to_be_unset(tmp_path):
    """compressed-tensors writes -1 for every column where the columns are in order."""
    stored, W64 = integers(random_weights(8, 96), 4, 32)
    tensors = {f"l.{ending}": tensor for ending, tensor in stored.items()}
    tensors["l.weight_g_idx"] = torch.full((96,), -1, dtype=torch.int32)
    W = decoded(tmp_path, tensors, groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32))
    assert torch.equal(W, rounded(W64))


@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_against_float64_and_compressed_tensors(tmp_path, symmetric):
    generator = torch.Generator().manual_seed(0)
    Q = torch.randint(-128, 128, (24, 40), generator=generator, dtype=torch.int8)
    scale = torch.rand(24, 1, generator=generator)
    tensors = {"l.weight": Q, "l.weight_scale": scale}
    zero = torch.randint(-8, 8, (24, 1), generator=generator, dtype=torch.int8)
    tensors |= {} if symmetric else {"l.weight_zero_point": zero}
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": symmetric}
    W = decoded(tmp_path, tensors, groups("int-quantized", **weights))
    assert torch.equal(W, rounded((Q.double() - (0 if symmetric else zero.double())).numpy() * scale.double().numpy()))
    assert torch.equal(W, theirs(tensors, "int-quantized", weights))


def test_scales_of_float16_give_float16(tmp_path):
    stored, _ = integers(random_weights(8, 64), 4, 32)
    tensors = {f"l.{ending}": tensor for ending, tensor in stored.items()}
    tensors["l.weight_scale"] = tensors["l.weight_scale"].half()
    form = groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
    checkpoint = open_source(tmp_path, tensors, form)
    assert checkpoint.read(["l.weight"])["l.weight"].dtype == torch.float16
    assert checkpoint.entries["l.weight"].float_dtype == torch.float16


def cases():
    """Tensors of a layer, and what their source's configuration says, for every way to cut a weight into slices."""
    stored, _ = fp8(random_weights(300, 96), (128, 64))
    yield {"l.weight": stored["weight"], "l.weight_scale_inv": stored["scale"]}, {
        "quant_method": "fp8", "weight_block_size": [128, 64]
    }  # fmt: skip
    stored, _ = fp8(random_weights(300, 96), None)
    yield {"l.weight": stored["weight"], "l.weight_scale": stored["scale"]}, {"quant_method": "fbgemm_fp8"}
    stored, _ = integers(random_weights(300, 96), 3, 32, symmetric=False)
    yield (
        {f"l.{ending}": tensor for ending, tensor in stored.items()},
        groups("pack-quantized", num_bits=3, type="int", strategy="group", group_size=32, symmetric=False),
    )
    stored, _ = mxfp4_experts(torch.randn(5, 64, 24, generator=torch.Generator().manual_seed(0)))
    yield {"l.weight_blocks": stored["blocks"], "l.weight_scales": stored["scales"]}, {"quant_method": "mxfp4"}


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("num_elements", [1, 5000, 20_000])
def test_slices_together_are_the_whole(tmp_path, monkeypatch, case, num_elements):
    tensors, quantization = list(cases())[case]
    checkpoint = open_source(tmp_path, tensors, quantization)
    W = checkpoint.read(["l.weight"])["l.weight"]
    pieces = [piece.clone() for piece in checkpoint.pieces("l.weight", num_elements)]
    assert torch.equal(torch.cat(pieces), W.flatten())
    assert len(pieces) > 1 or num_elements == 20_000
    monkeypatch.setattr("astro.storage.checkpoint._SLICE_ELEMENTS", num_elements)
    monkeypatch.setattr("astro.storage.checkpoint._BATCH_BYTES", 10_000)
    assert torch.equal(checkpoint.read(["l.weight"])["l.weight"], W)


@pytest.mark.parametrize("case", range(4))
def test_every_device_decodes_the_same_bits(tmp_path, device, case):
    with on_device(torch.device("cpu")):  # files are written from there
        checkpoint = open_source(tmp_path, *list(cases())[case])
    W = checkpoint.decoding_on(device).read(["l.weight"])["l.weight"]
    assert torch.equal(W, checkpoint.read(["l.weight"])["l.weight"])


@pytest.mark.parametrize("case", range(4))
def test_decoding_mixes_no_devices_and_does_not_wait(tmp_path, case):
    entry = open_source(tmp_path, *list(cases())[case]).entries["l.weight"]
    with fake_gpu() as watch:
        for part in entry.slices(5000):
            moved = {role: tensor.to("cuda") for role, tensor in part.parts.items()}
            decoded = entry.decode(dataclasses.replace(part, parts=moved))
            assert decoded.device.type == "cuda"
    assert not watch.mixed
    assert not watch.waits


def test_decoding_has_a_stream_of_its_own(tmp_path, monkeypatch):
    """What is read ahead is decoded while the device is at work on something else, for which nobody waits here."""
    checkpoint = open_source(tmp_path, *next(cases()))
    entered, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"beside {device}")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream) or contextlib.nullcontext())
    monkeypatch.setattr(
        torch.Tensor, "to", lambda X, place, *rest: X.clone() if place == torch.device("cuda") else to(X, place, *rest)
    )
    W = checkpoint.decoding_on(torch.device("cuda")).read(["l.weight"])["l.weight"]
    assert entered == ["beside cuda"]
    assert torch.equal(W, checkpoint.read(["l.weight"])["l.weight"])


def test_bytes_are_read_once_whatever_the_slices(tmp_path, monkeypatch):
    stored, _ = fp8(random_weights(300, 96), (128, 64))
    tensors = {"l.weight": stored["weight"], "l.weight_scale_inv": stored["scale"], "n": torch.ones(7)}
    checkpoint = open_source(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [128, 64]})
    read, fill = [], type(checkpoint.store).fill
    monkeypatch.setattr(
        type(checkpoint.store), "fill", lambda store, ranges: read.extend(ranges) or fill(store, ranges)
    )
    monkeypatch.setattr("astro.storage.checkpoint._SLICE_ELEMENTS", 1)
    checkpoint.read(["l.weight", "n"])
    spans = sorted((span.start, span.start + len(span.view)) for span in read)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert sum(stop - start for start, stop in spans) == sum(tensor.nbytes for tensor in tensors.values())


def test_block_is_never_guessed_from_the_scales(tmp_path):
    """192 rows with two scales: blocks of 128 and 64 rows, not twice 96, as the numbers suggest."""
    stored, W64 = fp8(random_weights(192, 128), (128, 128))
    tensors = {"l.weight": stored["weight"], "l.weight_scale_inv": stored["scale"]}
    W = decoded(tmp_path, tensors, BLOCKS_128)
    guessed = Fp8Dequantize(None)._dequantize_one(stored["weight"], stored["scale"], torch.bfloat16)
    assert torch.equal(W, rounded(W64))
    assert not torch.equal(W, guessed)


def test_scales_that_do_not_fit_the_block(tmp_path):
    stored, _ = fp8(random_weights(192, 128), (64, 64))
    tensors = {"l.weight": stored["weight"], "l.weight_scale_inv": stored["scale"]}
    with pytest.raises(CheckpointError, match=r"l.weight_scale_inv is \[3, 2\].*blocks of 128 × 128.*\[2, 1\]"):
        open_source(tmp_path, tensors, BLOCKS_128)


def test_fp8_without_a_scale(tmp_path):
    with pytest.raises(CheckpointError, match="l.weight is stored as F8_E4M3, but there is no scale beside it"):
        open_source(tmp_path, {"l.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, BLOCKS_128)


@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized"])
def test_asymmetric_weight_without_zero_points(tmp_path, form):
    stored, _ = integers(random_weights(8, 96), 8, 96, symmetric=False)
    tensors = {f"l.{ending}": tensor for ending, tensor in stored.items() if ending != "weight_zero_point"}
    if form == "int-quantized":
        tensors = {"l.weight": torch.ones(8, 96, dtype=torch.int8), "l.weight_scale": tensors["l.weight_scale"]}
    config = groups(form, num_bits=8, type="int", strategy="channel", symmetric=False)
    with pytest.raises(CheckpointError, match="is asymmetric by config.json, but there is no l.weight_zero_point"):
        open_source(tmp_path, tensors, config)


def test_packed_weight_without_a_scale(tmp_path):
    with pytest.raises(CheckpointError, match="l.weight_packed is packed, but there is no l.weight_scale"):
        open_source(
            tmp_path,
            {"l.weight_packed": torch.ones(4, 4).int()},
            groups("pack-quantized", num_bits=4, strategy="channel"),
        )


@pytest.mark.parametrize("name", ["l.weight", "l.e.down_proj", "l.e.down_proj_blocks"])
def test_bytes_without_a_scale(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"{name} is stored as U8, but there is no scale beside it"):
        open_source(tmp_path, {name: torch.ones(2, 4, 4, 16).byte()}, {"quant_method": "mxfp4"})


@pytest.mark.parametrize("scale", [torch.ones(4, 1), torch.ones(4, 2).to(torch.float8_e4m3fn)])
def test_bytes_of_an_unknown_format_are_not_taken_for_numbers(tmp_path, scale):
    """Two 4-bit integers in a byte would pass for one of 8 bits; nor is it NVFP4 where the second scale is missing."""
    with pytest.raises(CheckpointError, match="l.weight holds bytes in a format that is not known here"):
        open_source(
            tmp_path, {"l.weight": torch.ones(4, 16).byte(), "l.weight_scale": scale}, {"quant_method": "modelopt"}
        )


def test_a_table_of_bytes_is_no_weight(tmp_path):
    checkpoint = open_source(tmp_path, {"l.table": torch.ones(4, 4).byte()}, {"quant_method": "mxfp4"})
    assert checkpoint.read(["l.table"])["l.table"].dtype == torch.uint8


def test_nvfp4_without_its_global_scale(tmp_path):
    packed, scale, _, _ = nvfp4_parts()
    form = groups("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)
    with pytest.raises(CheckpointError, match="l.weight_packed is NVFP4, but there is no l.weight_global_scale"):
        open_source(tmp_path, {"l.weight_packed": packed, "l.weight_scale": scale}, form)


def test_weights_for_inputs_that_are_scaled_first(tmp_path):
    packed, scale, _, _ = nvfp4_parts()
    tensors = {"l.weight": packed, "l.weight_scale": scale, "l.weight_scale_2": torch.tensor(1.0)}
    tensors["l.pre_quant_scale"] = torch.ones(64)
    with pytest.raises(CheckpointError, match=r"l\.pre_quant_scale scales the inputs of a layer"):
        open_source(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"})


@pytest.mark.parametrize("name", ["l.input_scale", "l.weight_input_scale"])
def test_scales_of_activations_are_left_out_whatever_their_number(tmp_path, name):
    tensors = {
        "l.weight": torch.ones(3, 4).to(torch.float8_e4m3fn),
        "l.weight_scale": torch.ones(3),
        "o": torch.ones(2),
    }
    checkpoint = open_source(tmp_path, {**tensors, name: torch.ones(3)}, {"quant_method": "fbgemm_fp8"})
    assert list(checkpoint.entries) == ["l.weight", "o"]
    assert checkpoint.encoded.num_dropped == 1


def test_packed_matrix_whose_last_group_is_partial_without_a_stored_shape(tmp_path):
    tensors = {"l.weight_packed": torch.ones(8, 13).int(), "l.weight_scale": torch.ones(8, 4).bfloat16()}
    form = groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
    with pytest.raises(CheckpointError, match=r"l.weight_packed is \[8, 13\].*128 columns.*expected \[8, 16\]"):
        open_source(tmp_path, tensors, form)


def test_packed_tensor_that_is_no_matrix(tmp_path):
    tensors = {"l.weight_packed": torch.ones(2, 4, 4).int(), "l.weight_scale": torch.ones(2, 4, 1)}
    with pytest.raises(CheckpointError, match=r"l.weight_packed is \[2, 4, 4\]; packed weights are decoded from"):
        open_source(tmp_path, tensors, groups("pack-quantized", num_bits=4, strategy="channel"))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "torchao"])
def test_methods_that_are_not_decoded(tmp_path, method):
    with pytest.raises(CheckpointError, match=f"config.json: the model is quantized already, by {method}"):
        open_source(tmp_path, {"l.weight": torch.ones(2, 2)}, {"quant_method": method})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "marlin-24"}, "marlin-24"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "a rotated basis"),
    ],
)
def test_forms_of_compressed_tensors_that_are_not_decoded(tmp_path, change, reason):
    form = groups("pack-quantized", num_bits=4, strategy="channel") | change
    with pytest.raises(CheckpointError, match=f"quantized already, by compressed-tensors in {reason}"):
        open_source(tmp_path, {"l.weight": torch.ones(2, 2)}, form)


def test_configuration_without_the_block(tmp_path):
    with pytest.raises(CheckpointError, match="quantization_config is incomplete: KeyError\\('num_bits'\\)"):
        open_source(tmp_path, {"l.weight": torch.ones(2, 2)}, groups("pack-quantized", strategy="channel"))


def test_each_layer_has_the_scheme_of_its_config_group(tmp_path):
    wide, W64 = integers(random_weights(8, 64), 8, 64)
    narrow, V64 = integers(random_weights(8, 64, 5), 4, 32)
    tensors = {f"m.a.{e}": t for e, t in wide.items()} | {f"m.b.{e}": t for e, t in narrow.items()}
    form = groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
    form["config_groups"]["group_1"] = {
        "targets": [r"re:.*\.a$"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}
    }  # fmt: skip
    read = open_source(tmp_path, tensors, form).read(["m.a.weight", "m.b.weight"])
    assert torch.equal(read["m.a.weight"], rounded(W64))
    assert torch.equal(read["m.b.weight"], rounded(V64))


@pytest.mark.parametrize(
    ("first", "second"), [("lm_head", "Linear"), ("re:.*a", "m.a"), ("FusedMoE", "Linear"), ("Linear", "re:.*a$")]
)
def test_order_of_targets_is_that_of_compressed_tensors(tmp_path, first, second):
    """Names, then patterns, then classes, whichever config group comes first; a name is never taken for a class."""
    stored, W64 = integers(random_weights(8, 64), 4, 32)
    weights = {"type": "int", "strategy": "group", "group_size": 32}
    form = groups("pack-quantized")
    form["config_groups"] = {
        "group_0": {"targets": [first], "weights": {"num_bits": 8, **weights}},
        "group_1": {"targets": [second], "weights": {"num_bits": 4, **weights}},
    }
    W = decoded(tmp_path, {f"m.a.{e}": t for e, t in stored.items()}, form, "m.a.weight")
    assert torch.equal(W, rounded(W64))


def test_quantization_config_inside_the_text_config(tmp_path):
    stored, W64 = integers(random_weights(8, 64), 4, 32)
    tensors = {f"l.{ending}": tensor for ending, tensor in stored.items()}
    form = groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
    checkpoint = open_source(tmp_path, tensors, None, text_config={"quantization_config": form})
    assert torch.equal(checkpoint.read(["l.weight"])["l.weight"], rounded(W64))


def test_config_without_quantization():
    config = {"a": 1, "quantization_config": {"x": 1}, "text_config": {"b": 2, "quantization_config": {}}}
    assert without_quantization(config) == {"a": 1, "text_config": {"b": 2}}


def test_two_configurations_that_differ(tmp_path):
    inner = {"quantization_config": {"quant_method": "mxfp4"}}
    with pytest.raises(UnsupportedError, match="several quantization_config that differ"):
        open_source(tmp_path, {"l.weight": torch.ones(2, 2)}, BLOCKS_128, text_config=inner)


def test_fingerprint_samples_scales(tmp_path):
    stored, _ = fp8(random_weights(128, 128), (128, 128))
    tensors = {"l.weight": stored["weight"], "l.weight_scale_inv": stored["scale"]}
    before = open_source(tmp_path, tensors, BLOCKS_128).fingerprint()
    assert Checkpoint.open(tmp_path).fingerprint() == before, "it is of the files, however they are read"
    tensors["l.weight_scale_inv"] = stored["scale"] * 2
    assert open_source(tmp_path, tensors, BLOCKS_128).fingerprint() != before


def test_fingerprint_covers_the_configuration_of_modelopt(tmp_path):
    save_file({"l.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    seen = {Checkpoint.open(tmp_path).fingerprint()}
    for method in ("FP8", "MXFP8"):
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": method}}))
        seen.add(Checkpoint.open(tmp_path).fingerprint())
    assert len(seen) == 3


def test_scales_that_are_not_finite_are_found(tmp_path):
    stored, _ = fp8(random_weights(300, 128), (128, 128))
    scale = stored["scale"].clone()
    scale[2, 0] = float("nan")
    tensors = {"l.weight": stored["weight"], "l.weight_scale_inv": scale}
    with pytest.raises(CheckpointError, match="tensor l.weight holds NaN or Inf"):
        require_finite(open_source(tmp_path, tensors, BLOCKS_128))
