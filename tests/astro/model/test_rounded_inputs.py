"""Forwards that round the inputs of quantized layers, against the same layers called one by one."""

import pytest
import torch
from torch import nn

from astro.activation_config import ActivationScheme
from astro.errors import UnsupportedError
from astro.model.activation_rounding import round_activations
from astro.model.activations import BlockLayers
from astro.model.operands import Operand
from astro.model.rounded_inputs import rounded_inputs
from tests.astro.model.test_experts import Opened, parts

INT4 = ActivationScheme(4, "int")


def linears_of(opened):
    """The linear modules of the block that are quantized, and those that are not."""
    quantized = {linear.parameter.removesuffix(".weight") for linear in opened.linears}
    modules = [(n, m) for n, m in opened.skeleton.model.named_modules() if isinstance(m, nn.Linear) and ".1." in n]
    return [m for n, m in modules if n in quantized], [m for n, m in modules if n not in quantized]


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_linear_layers_multiply_rounded_inputs_and_gates_do_not(name, tmp_path):
    opened = Opened(name, tmp_path)
    quantized, exact = linears_of(opened)
    calls = []
    for module in (*quantized, *exact):
        module.register_forward_hook(lambda module, args, output: calls.append((module, args[0], output)))
    with rounded_inputs(opened.layers, INT4):
        opened.forward()
    assert {module for module, *_ in calls} >= set(quantized)
    for module, X, Y in calls:
        inputs = round_activations(X, INT4) if module in quantized else X
        torch.testing.assert_close(Y, nn.functional.linear(inputs, module.weight, module.bias), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_each_expert_multiplies_what_it_is_given_rounded(name, tmp_path):
    opened, outputs = Opened(name, tmp_path), []
    known = opened.statistics()
    opened.experts.register_forward_hook(lambda module, args, output: outputs.append(output))
    del opened.routed[:]
    with rounded_inputs(opened.layers, INT4):
        opened.forward()
    X, index, weights = opened.routed[0]
    expected = torch.zeros_like(X, dtype=torch.float64)
    for expert, (pair, down) in enumerate(parts(known)):
        opened.expert = expert
        tokens, places = (index == expert).nonzero(as_tuple=True)
        if len(tokens):
            hidden = opened.act(round_activations(X[tokens], INT4).double(), *pair)
            Y = round_activations(hidden.float(), INT4).double() @ opened.weights(down[0]).T
            if "GptOss" in type(opened.experts).__name__:
                Y += opened.experts.down_proj_bias[expert]
            expected[tokens] += Y * weights[tokens, places].double().unsqueeze(-1)
    torch.testing.assert_close(outputs[0].double(), expected, rtol=2e-2, atol=2e-3 * float(expected.abs().max()))
    assert (outputs[0].double() - expected).abs().median() < 1e-6


@torch.no_grad()
def test_experts_in_one_batched_product_are_rounded(tmp_path):
    opened, outputs = Opened("llama4", tmp_path), []
    opened.experts.register_forward_hook(lambda module, args, output: outputs.append(output))
    with rounded_inputs(opened.layers, INT4):
        opened.forward()
    X = round_activations(opened.routed[0][0].reshape(4, -1, 64), INT4)
    gate, up = torch.bmm(X, opened.experts.gate_up_proj).chunk(2, dim=-1)
    hidden = round_activations(up * torch.nn.functional.silu(gate), INT4)
    expected = torch.bmm(hidden, opened.experts.down_proj)
    torch.testing.assert_close(outputs[0].reshape(expected.shape), expected)


@torch.no_grad()
def test_observation_inside_sees_inputs_before_they_are_rounded(tmp_path):
    opened, seen, plain = Opened("mixtral", tmp_path), {}, {}
    first = opened.layers.operands[0]
    for inputs, scheme in ((seen, INT4), (plain, None)):
        note = lambda operand, given, inputs=inputs: inputs.setdefault(operand, given.X)  # noqa: E731
        with rounded_inputs(opened.layers, scheme), opened.layers.observed(note):
            opened.forward()
    assert torch.equal(seen[first], plain[first])
    assert {*seen} == {*plain}


@torch.no_grad()
def test_layer_whose_product_is_not_seen_is_an_error(tmp_path, monkeypatch):
    opened = Opened("mixtral", tmp_path)
    operand = Operand(("model.layers.1.lost_proj",), opened.layers.operands[0].parameter, None, 64)
    lost = BlockLayers(opened.skeleton.model, opened.linears)
    lost.operands = (*lost.operands, operand)
    monkeypatch.setattr(lost, "places", opened.layers.places)
    unseen = pytest.raises(UnsupportedError, match=r"lost_proj: no product of this layer was seen")
    with unseen, rounded_inputs(lost, INT4):
        opened.forward()
    with rounded_inputs(lost, INT4, is_whole=False):
        opened.forward()
