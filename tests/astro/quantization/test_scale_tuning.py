"""Tuned scales: the steps against naive ones in float64 and autograd, and what holds of every result."""

import dataclasses

import pytest
import torch

from astro.config import LayerScheme, SolverSettings
from astro.model import weight_gradients
from astro.model.activations import BlockLayers
from astro.model.block_call import BlockState, forward
from astro.model.recording import count_outputs, record
from astro.model.skeleton import Skeleton
from astro.quantization.grid import QuantizedLinear, fit_grid, grouped
from astro.quantization.scale_tuning import TuningText, tune_scales
from astro.storage.checkpoint import Checkpoint
from tests.support.architectures import DENSE, EXPERTS
from tests.support.dequantized import keys_of
from tests.support.devices import here
from tests.support.models import write_checkpoint

pytestmark = pytest.mark.usefixtures("device")

STEPS, TEXTS, SEQUENCES, TOKENS = 5, 2, 3, 12
NAMES = ["llama", "qwen3-moe", "gpt-oss"]  # layers of their own, experts in one parameter, and these transposed


class Block:
    """The second block of a tiny model on a 3-bit grid, with inputs and wanted outputs."""

    def __init__(self, folder, name, dtype=torch.float64, scale_dtype=torch.float32, symmetric=True, group_size=16):
        write_checkpoint(folder, {**DENSE, **EXPERTS}[name])
        checkpoint, self.skeleton = Checkpoint.open(folder), Skeleton(folder, dtype)
        self.skeleton.load(self.skeleton.model, checkpoint.read(checkpoint.entries), here())
        ids = torch.arange(TEXTS * SEQUENCES * TOKENS, device=here()).reshape(TEXTS, SEQUENCES, TOKENS) * 7 % 90
        num_outputs = count_outputs(self.skeleton, ids[0])
        recorded = [record(self.skeleton, each, num_outputs) for each in ids]
        self.calls = [calls[1] for _, calls in recorded]
        self.states = [BlockState(hidden) for hidden, _ in recorded]
        linears = self.skeleton.linear_layers(1, keys_of(self.skeleton, checkpoint, 1))[0]
        self.layers = BlockLayers(self.skeleton.model, linears)
        self.scale_dtype = scale_dtype
        self.original = {name: self.layers.weight(name).clone() for name in self.layers.by_name}
        self.solved = {name: self._rounded(name, symmetric, group_size) for name in self.original}
        generator = torch.Generator().manual_seed(0)
        texts = [lambda i=i: self.run(i) for i in range(TEXTS)]
        weights = [torch.rand(SEQUENCES * TOKENS, generator=generator).to(here()) + 0.1 for _ in texts]
        self.texts = [TuningText(text, text(), w) for text, w in zip(texts, weights, strict=True)]
        self.write(self.solved)

    def _rounded(self, name, symmetric, group_size):
        W = self.original[name].float()
        scheme = LayerScheme(bits=bits_of(name), group_size=group_size, symmetric=symmetric)
        grid = fit_grid(W, scheme, SolverSettings(scale_search="mse"), self.scale_dtype)
        return QuantizedLinear(grid.quantize(W), grid)

    def run(self, i):
        return forward(self.skeleton.blocks[1], self.states[i], self.calls[i]).hidden

    def write(self, layers):
        for name, layer in layers.items():
            layer.dequantize_into_(self.layers.weight(name))

    def error(self):
        """The error of the outputs relative to their energy, in float64."""
        error = energy = 0.0
        for text in self.texts:
            weights, wanted = text.weights.double(), text.wanted.double()
            error += float((weights * (text.forward().double() - wanted).square().sum(-1).flatten()).sum())
            energy += float((weights * wanted.square().sum(-1).flatten()).sum())
        return error / energy

    def tuned(self, steps=STEPS):
        return tune_scales(self.layers, self.solved, self.texts, steps, self.scale_dtype)


@pytest.fixture(params=NAMES)
def block(request, tmp_path):
    with torch.no_grad():
        yield Block(tmp_path / request.param, request.param)


def bits_of(name):
    return 2 if name.endswith("down_proj") else 3


def naive(block):
    """Scales after as many steps of Adam, whose gradients autograd finds in float64 from eq. 1 and 2."""
    names, parameters = list(block.solved), [operand.parameter for operand in block.layers.operands]
    get = block.skeleton.model.get_parameter
    scales = {name: layer.grid.scale.double() for name, layer in block.solved.items()}
    V = {name: grouped(each.Q.double(), 16) - each.grid.zero.double()[..., None] for name, each in block.solved.items()}
    p = {name: torch.zeros_like(scale, requires_grad=True) for name, scale in scales.items()}
    first, second = (dict.fromkeys(names, 0.0) for _ in range(2))
    mean = torch.cat([text.weights.double() for text in block.texts]).mean()
    of_tokens = [text.weights.double() / mean for text in block.texts]
    root = sum(float((w * squares(text)).sum()) for w, text in zip(of_tokens, block.texts, strict=True)) ** 0.5
    size = sum(text.wanted.numel() for text in block.texts)
    for step in range(STEPS):
        text = block.texts[step % TEXTS]
        with torch.enable_grad():
            W = {name: (V[name] * (scales[name] * (1 + p[name]))[..., None]).flatten(-2) for name in names}
            for name in names:
                block.layers.weight(name).copy_(W[name].detach())
            for parameter in parameters:
                get(parameter).requires_grad_(True).grad = None
            # Half of eq. 2 times a number, which only matters beside Adam's 1e-8.
            factor = (size / SEQUENCES / TOKENS) ** 0.5 / root
            (of_tokens[step % TEXTS] * squares(text) / 2).sum().mul(factor).backward()
            at = {name: get(block.layers.by_name[name].parameter).grad for name in names}
            dot = sum((W[name] * block.layers._layers[name].view(at[name])).sum() for name in names)
            gradients = torch.autograd.grad(dot, [p[name] for name in names])
        for parameter in parameters:
            get(parameter).requires_grad_(False).grad = None
        for name, g in zip(names, gradients, strict=True):
            first[name], second[name] = 0.9 * first[name] + 0.1 * g, 0.95 * second[name] + 0.05 * g.square()
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
            length = 0.1 / (2 ** (bits_of(name) - 1) * STEPS**0.5)
            p[name].data -= length * (1 - step / STEPS) * mean / (square.sqrt() + 1e-8)
    return {name: scales[name] * (1 + p[name].detach()) for name in names}


def squares(text):
    return (text.forward() - text.wanted).square().sum(-1).flatten()


def test_steps_against_naive_float64(block):
    expected = naive(block)
    block.write(block.solved)
    tuned = block.tuned()
    assert not tuned.reason
    for name, scale in expected.items():
        torch.testing.assert_close(tuned.layers[name].grid.scale.double(), scale, rtol=1e-4, atol=0)


def test_only_scales_move_and_the_error_falls(block):
    before = block.error()
    tuned = block.tuned(10)
    assert tuned.error_before == pytest.approx(before, rel=1e-5)
    assert tuned.error_after < 0.97 * before
    assert block.error() == pytest.approx(tuned.error_after, rel=1e-5), "it computes with what is returned"
    block.write(tuned.layers)
    assert block.error() == pytest.approx(tuned.error_after, rel=1e-5)
    for name, layer in block.solved.items():
        after = tuned.layers[name]
        assert torch.equal(after.Q, layer.Q)
        assert torch.equal(after.grid.zero, layer.grid.zero)
        factors = after.grid.scale / layer.grid.scale
        assert 0.9 < float(factors.min()) <= float(factors.max()) < 1.1
    parameters = [block.skeleton.model.get_parameter(operand.parameter) for operand in block.layers.operands]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in parameters)


@pytest.mark.parametrize("group_size", [16, -1])
@torch.no_grad()
def test_scales_are_exact_in_the_stored_dtype_and_zero_points_are_minded(tmp_path, group_size):
    block = Block(tmp_path / "m", "llama", torch.float32, torch.bfloat16, symmetric=False, group_size=group_size)
    before, tuned = block.error(), block.tuned(20)
    assert tuned.error_after < before
    assert block.error() == pytest.approx(tuned.error_after, rel=1e-4)
    scales = torch.cat([layer.grid.scale.flatten() for layer in tuned.layers.values()])
    assert torch.equal(scales, scales.bfloat16().float())
    assert any(bool(layer.grid.zero.any()) for layer in tuned.layers.values())


@torch.no_grad()
def test_no_scale_changes_its_sign_in_many_steps(tmp_path):
    block = Block(tmp_path / "m", "llama")
    block.texts = [dataclasses.replace(text, wanted=-text.wanted) for text in block.texts]  # pulls as far as it may
    tuned = block.tuned(1000)
    assert not tuned.reason
    (name,) = (name for name in tuned.layers if bits_of(name) == 2)  # by the rule for few steps it would go 0.79 away
    factors = tuned.layers[name].grid.scale / block.solved[name].grid.scale
    assert 0.4 < float((factors - 1).abs().max()) < 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_forwards_in_16_bits_tune_too(tmp_path, dtype):
    block = Block(tmp_path / "m", "llama", dtype, dtype)
    tuned = block.tuned(20)
    assert tuned.error_after < 0.97 * tuned.error_before


@torch.no_grad()
def test_nothing_that_is_no_better_is_taken(tmp_path):
    block = Block(tmp_path / "m", "llama")
    endless = dataclasses.replace(block.texts[1], weights=torch.full_like(block.texts[1].weights, 1e30))
    block.texts[0] = dataclasses.replace(block.texts[0], weights=torch.zeros(SEQUENCES * TOKENS, device=here()))
    away = dataclasses.replace(block.texts[0], wanted=-block.texts[0].wanted, weights=block.texts[0].weights + 1e-20)
    block.texts = [away, endless]  # every step is made for a text that hardly counts
    before = block.error()
    tuned = block.tuned(1)
    assert tuned.reason == "no step lowered the error"
    assert tuned.layers is block.solved
    assert tuned.error_before == tuned.error_after
    assert block.error() == before, "the block computes with the scales of the solve again"


@torch.no_grad()
def test_a_block_that_is_right_stays_as_it_is(tmp_path):
    block = Block(tmp_path / "m", "llama")
    block.texts = [dataclasses.replace(text, wanted=text.forward()) for text in block.texts]
    tuned = block.tuned()
    assert tuned.layers is block.solved
    assert "returns what it is to return" in tuned.reason


@torch.no_grad()
def test_a_block_that_is_to_return_zeros_stays_as_it_is_and_says_so(tmp_path):
    block = Block(tmp_path / "m", "llama")
    block.texts = [dataclasses.replace(text, wanted=torch.zeros_like(text.wanted)) for text in block.texts]
    tuned = block.tuned()
    assert tuned.layers is block.solved
    assert tuned.reason == "the block is to return nothing but zeros"
    assert (tuned.error_before, tuned.error_after) == (None, None)


@torch.no_grad()
def test_a_block_without_gradient_stays_as_it_is_and_says_so(tmp_path):
    block = Block(tmp_path / "m", "llama")
    block.texts = [
        dataclasses.replace(text, forward=lambda forward=text.forward: forward().detach()) for text in block.texts
    ]
    before, tuned = block.error(), block.tuned()
    assert tuned.layers is block.solved
    assert "no gradient passes through this block" in tuned.reason
    assert block.error() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_outputs_that_are_no_numbers_are_said(tmp_path, value):
    block = Block(tmp_path / "m", "llama")
    wanted = block.texts[0].wanted.clone()
    wanted[0, 1, 2] = value
    block.texts[0] = dataclasses.replace(block.texts[0], wanted=wanted)
    tuned = block.tuned()
    assert tuned.layers is block.solved
    assert (tuned.error_before, tuned.error_after) == (None, None)
    assert tuned.reason == "what the block returns is not finite"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@torch.no_grad()
def test_size_of_the_weights_of_tokens_does_not_matter(tmp_path, dtype):
    results = []
    for size in (1.0, 2.0**40, 2.0**-40):
        block = Block(tmp_path / str(size), "llama", dtype, torch.float16)
        block.texts = [dataclasses.replace(text, weights=text.weights * size) for text in block.texts]
        results.append(block.tuned())
    for tuned in results:
        assert not tuned.reason
        for name, layer in tuned.layers.items():
            assert torch.equal(layer.grid.scale, results[0].layers[name].grid.scale)


@torch.no_grad()
def test_experts_have_no_gradient_of_the_whole_parameter(tmp_path, monkeypatch):
    block, seen = Block(tmp_path / "m", "qwen3-moe"), []
    real = weight_gradients._see
    monkeypatch.setattr(weight_gradients, "_see", lambda *args: seen.append(args[-1].ndim) or real(*args))
    block.tuned()
    assert len(seen) > 2 * STEPS
    assert set(seen) == {2}


@torch.no_grad()
def test_a_pass_that_dies_leaves_no_gradient(tmp_path):
    block = Block(tmp_path / "m", "llama")

    def dying(*_):
        raise ValueError("out of luck")

    with pytest.raises(ValueError, match="out of luck"), block.layers.differentiated(dying), torch.enable_grad():
        block.texts[0].forward().sum().backward()
    for operand in block.layers.operands:
        parameter = block.skeleton.model.get_parameter(operand.parameter)
        assert parameter.grad is None
        assert not parameter.requires_grad
