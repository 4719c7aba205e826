"""A block's shard and back: plain layers, transposed ones, experts that the source holds fused, and their biases."""

import dataclasses

import pytest
import torch

from astro.config import LayerScheme, SolverSettings
from astro.formats import LAYOUTS
from astro.formats.block_shard import kept_keys, pack_block, unpack_block
from astro.model.linear_layer import LinearLayer
from astro.quantization.grid import QuantizedLinear, fit_grid
from tests.support.models import random_weights

SCHEME = LayerScheme(group_size=32)


def joined_expert(index):
    """Gate and up of an expert as one layer, whose packed tensors have other names, and no `weight_shape`."""
    stem = f"experts.{index}.w13"
    layer = LinearLayer(stem, "experts.gate_up", 32, 64, stem, "experts.gate_up", index, 0, 1, True, "experts.bias")
    return dataclasses.replace(layer, joint="_")


def expert(index, first, part):
    """Gate and up of an expert, row by row in turn, in a parameter [E, columns, rows]."""
    stem = f"experts.{index}.{part}"
    return LinearLayer(stem, "experts.gate_up", 32, 64, stem, "experts.gate_up", index, first, 2, True, "experts.bias")


BLOCKS = {
    "plain": ([LinearLayer.plain("q", "q.weight", 32, 64)], {"q.weight": (32, 64), "q.bias": (32,), "norm": (64,)}),
    "transposed": ([LinearLayer.plain("q", "q.weight", 32, 64, transposed=True)], {"q.weight": (64, 32)}),
    "fused experts": (
        [expert(index, first, part) for index in range(2) for first, part in enumerate(("gate", "up"))],
        {"experts.gate_up": (2, 64, 64), "experts.bias": (2, 64), "router": (2, 64)},
    ),
    "joined experts": (
        [joined_expert(index) for index in range(2)],
        {"experts.gate_up": (2, 64, 32), "experts.bias": (2, 32)},
    ),
}

pytestmark = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture(params=BLOCKS)
def block(request):
    """Layers, the source's tensors, and the quantized layers."""
    layers, shapes = BLOCKS[request.param]
    generator = torch.Generator().manual_seed(0)
    source = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    quantized = {}
    for i, layer in enumerate(layers):
        W = random_weights(32, 64, seed=i)
        grid = fit_grid(W, SCHEME, SolverSettings(), torch.float16, torch.ones(64))
        quantized[layer.name] = QuantizedLinear(grid.quantize(W), grid)
    return layers, source, quantized


CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


def shard(layout, block, device=CPU):
    layers, source, quantized = block
    kept = {key: source[key] for key in kept_keys(layers, source)}
    return pack_block(layout, layers, dict(quantized), kept, torch.float16, device)


def test_round_trip(layout, block):
    layers, source, quantized = block
    shapes = {key: tuple(tensor.shape) for key, tensor in source.items()}
    schemes = dict.fromkeys(layers, SCHEME)
    read = unpack_block(layout, schemes, shard(layout, block), shapes, torch.float32, CPU)
    assert {key: tuple(tensor.shape) for key, tensor in read.items()} == shapes
    for layer in layers:
        assert torch.equal(layer.stored(read[layer.key]), quantized[layer.name].dequantize())
    assert all(torch.equal(read[key], source[key]) for key in kept_keys(layers, source))


def test_shard_holds_linear_layers_and_what_is_kept(layout, block):
    layers, source, _ = block
    expected = {f"{layer.stem}{layer.joint}{suffix}" for layer in layers for suffix in layout.suffixes(SCHEME)}
    expected |= {f"{layer.stem}{layer.joint}bias" for layer in layers if layer.bias}
    expected -= {f"experts.{index}.w13_weight_shape" for index in range(2)}
    expected |= set(source) - {layer.key for layer in layers} - {layer.bias for layer in layers}
    assert set(shard(layout, block)) == expected


def test_packing_takes_the_layers_out(layout, block):
    layers, source, quantized = block
    pack_block(layout, layers, quantized, source, torch.float16, CPU)
    assert not quantized


def test_layers_are_packed_on_the_device(layout, block):
    packed = shard(layout, block, ELSEWHERE)
    expected = shard(layout, block)
    matrices = {key for key, tensor in expected.items() if tensor.ndim > 1} - set(block[1])
    assert {key for key, tensor in packed.items() if tensor.device == ELSEWHERE} == matrices
    assert {k: (t.shape, t.dtype) for k, t in packed.items()} == {k: (t.shape, t.dtype) for k, t in expected.items()}


def test_layers_travel_packed_and_become_weights_on_the_device(layout, block, monkeypatch):
    layers, source, _ = block
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: True)  # elsewhere there are no values to check
    shapes, schemes = {key: tuple(tensor.shape) for key, tensor in source.items()}, dict.fromkeys(layers, SCHEME)
    read = unpack_block(layout, schemes, shard(layout, block), shapes, torch.bfloat16, ELSEWHERE)
    weights = {layer.key for layer in layers}
    assert {key for key, tensor in read.items() if tensor.device == ELSEWHERE} == weights
    assert {read[key].dtype for key in weights} == {torch.bfloat16}
