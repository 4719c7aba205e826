"""The gradient's way back through a block against the whole model's own."""

import weakref

import pytest
import torch
import transformers

from astro.calibration.backward import pass_back
from astro.calibration.block_statistics import input_stages
from astro.errors import UnsupportedError
from astro.model.activations import BlockLayers
from astro.model.block_call import BlockState, forward
from astro.model.operands import names_of
from astro.model.perplexity import loss_gradient
from astro.model.recording import count_outputs, record
from astro.model.skeleton import Skeleton
from astro.storage.checkpoint import Checkpoint
from tests.support.architectures import DENSE, EXPERTS, IDS, STATEFUL
from tests.support.dequantized import keys_of
from tests.support.models import write_checkpoint

CPU = torch.device("cpu")


def whole_model(folder, names):
    """Energies of layers by the whole model's own backward, but of those that it does not reach, such as indexers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    energies, outputs = {}, {}

    def keep(name, out):
        if out.requires_grad:
            out.retain_grad()
            outputs[name] = out

    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: keep(name, out))
    logits = model(input_ids=IDS, use_cache=False).logits.float()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    for name, out in outputs.items():
        if out.grad is not None:
            energies[name] = out.grad.square().flatten(0, -2)
    return energies


@pytest.mark.parametrize("name", [*DENSE, *EXPERTS, *STATEFUL])
def test_gradient_block_by_block_is_that_of_the_whole_model(name, tmp_path):
    folder = write_checkpoint(tmp_path / name, {**DENSE, **EXPERTS, **STATEFUL}[name])
    checkpoint, skeleton = Checkpoint.open(folder), Skeleton(folder, torch.float32)
    skeleton.load(skeleton.model, checkpoint.read(checkpoint.entries), CPU)
    skeleton.model.tie_weights()
    assert not any(parameter.requires_grad for parameter in skeleton.model.parameters())
    num_outputs = count_outputs(skeleton, IDS[:1])
    with torch.no_grad():
        hidden, calls = record(skeleton, IDS, num_outputs)
        inputs = [BlockState(hidden)]
        for block, call in zip(skeleton.blocks, calls, strict=True):
            inputs.append(forward(block, inputs[-1], call))
        gradient = BlockState(loss_gradient(skeleton, IDS, inputs[-1].hidden, num_outputs))
        linears = [
            skeleton.linear_layers(index, keys_of(skeleton, checkpoint, index))[0]
            for index in range(len(skeleton.blocks))
        ]
        plain = [layer.name for layers in linears for layer in layers if layer.expert is None]
        with torch.enable_grad():
            expected = whole_model(folder, plain)
        for index in reversed(range(len(skeleton.blocks))):
            layers = BlockLayers(skeleton.model, linears[index])
            run = lambda X, index=index: forward(skeleton.blocks[index], X, calls[index])  # noqa: E731
            passed = pass_back(layers, run, inputs[index], gradient)
            gradient, energies = passed.gradient, passed.energies
            stages = input_stages(layers, lambda run=run, index=index: run(inputs[index]))
            read = [names_of(group) for stage in stages for group in stage if group[0].expert is None]
            groups = {names[0]: [expected[name] for name in names if name in expected] for names in read}
            groups = {first: reached for first, reached in groups.items() if reached}
            experts = {operand.parameter for operand in layers.operands if operand.expert is not None}
            assert set(energies) - experts == set(groups)
            assert bool(experts & set(energies)) == (bool(experts) and name != "llama4")  # whose experts are batched
            for first, reached in groups.items():
                mean = torch.cat(reached, dim=-1).mean(-1)
                torch.testing.assert_close(energies[first], mean, rtol=1e-3, atol=1e-5 * float(mean.max()))


@torch.no_grad()
def test_the_graph_of_a_block_is_freed(llama):
    checkpoint, skeleton = Checkpoint.open(llama), Skeleton(llama, torch.float32)
    skeleton.load(skeleton.model, checkpoint.read(checkpoint.entries), CPU)
    hidden, calls = record(skeleton, IDS, count_outputs(skeleton, IDS[:1]))
    layers = BlockLayers(skeleton.model, skeleton.linear_layers(0, keys_of(skeleton, checkpoint, 0))[0])
    graph = []

    def action(X):
        output = forward(skeleton.blocks[0], X, calls[0])
        graph.append(weakref.ref(output.hidden))
        return output

    with layers.observed(lambda operand, inputs: graph.append(weakref.ref(inputs.X))):
        pass_back(layers, action, BlockState(hidden), BlockState(torch.ones_like(hidden)))
    assert len(graph) == 8
    assert not any(tensor() is not None for tensor in graph)


def test_a_block_without_gradient_is_said(llama):
    checkpoint, skeleton = Checkpoint.open(llama), Skeleton(llama, torch.float32)
    layers = BlockLayers(skeleton.model, skeleton.linear_layers(0, keys_of(skeleton, checkpoint, 0))[0])
    skeleton.load(skeleton.blocks[0], checkpoint.read(keys_of(skeleton, checkpoint, 0)), CPU)
    hidden = BlockState(torch.ones(1, 2, 64))
    with pytest.raises(UnsupportedError, match="no gradient passes through this block"):
        pass_back(layers, lambda state: BlockState(state.hidden.detach() * 2), hidden, hidden)

    def failing(X):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="can't allocate memory"):  # another worker may have more
        pass_back(layers, failing, hidden, hidden)


def opened_experts(name, folder, ids):
    """The second block of a tiny mixture of experts, and its input for some tokens."""
    write_checkpoint(folder, EXPERTS[name])
    checkpoint, skeleton = Checkpoint.open(folder), Skeleton(folder, torch.float32)
    skeleton.load(skeleton.model, checkpoint.read(checkpoint.entries), CPU)
    hidden, calls = record(skeleton, ids, count_outputs(skeleton, ids))
    linears = skeleton.linear_layers(1, keys_of(skeleton, checkpoint, 1))[0]
    run = lambda state: forward(skeleton.blocks[1], state, calls[1])  # noqa: E731
    return skeleton, BlockLayers(skeleton.model, linears), BlockState(hidden), run


@pytest.mark.parametrize("name", [name for name in EXPERTS if name != "llama4"])
@torch.no_grad()
def test_energy_at_experts_against_the_gradient_of_their_weights(name, tmp_path):
    """For a single token it is ‖∂ℓ/∂W‖² / ‖x‖², added up over the token's experts."""
    skeleton, layers, hidden, run = opened_experts(name, tmp_path / name, IDS[:1, :1])
    expert = next(operand for operand in layers.operands if operand.expert is not None)
    gradient = torch.randn(hidden.hidden.shape, generator=torch.Generator().manual_seed(0))
    passed = pass_back(layers, run, hidden, BlockState(gradient))
    energies = passed.energies
    for parameter in {operand.parameter for operand in layers.operands if operand.expert is not None}:
        alone = [
            passed.of_experts.get(operand.names[0]) for operand in layers.operands if operand.parameter == parameter
        ]
        assert sum(float(energy.sum()) for energy in alone if energy is not None) == pytest.approx(
            float(energies[parameter].sum()), rel=1e-5
        )
    parameter, seen = skeleton.model.get_parameter(expert.parameter), []
    layers.module_of(expert).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.enable_grad():
        parameter.requires_grad_(True)
        run(hidden).hidden.backward(gradient)
    (x,) = seen
    outputs = parameter[0].numel() // x.shape[-1]
    expected = parameter.grad.square().sum() / x.square().sum() / outputs
    torch.testing.assert_close(energies[expert.parameter], expected.reshape(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", EXPERTS)
@torch.no_grad()
def test_it_is_seen_which_tokens_an_expert_is_given(name, tmp_path):
    _, layers, hidden, run = opened_experts(name, tmp_path / name, IDS)
    expert = next(operand for operand in layers.operands if operand.expert is not None)
    inputs, seen = {}, []
    layers.module_of(expert).register_forward_pre_hook(
        lambda m, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with layers.observed(lambda operand, given: inputs.update({operand: given})):
        run(hidden)
    tokens = {
        operand.expert: given.tokens for operand, given in inputs.items() if operand.parameter == expert.parameter
    }
    for operand, given in inputs.items():
        if operand.expert is None:
            assert given.tokens is None
        elif (
            operand.parameter == expert.parameter and name != "llama4"
        ):  # which multiplies inputs by the router's weight
            assert torch.equal(seen[0][given.tokens], given.X)
        else:
            assert torch.equal(given.tokens, tokens[operand.expert])
            assert len(given.X) == len(given.tokens)
    assert len(inputs) > 2
