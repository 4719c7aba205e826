"""Layers that read one input and round it between clips of their own: products, Hessians and token weights of each."""

import dataclasses

import pytest
import torch
from torch import nn

from astro.activation_config import ActivationScheme
from astro.calibration.backward import pass_back
from astro.calibration.block_statistics import BlockStatistics, input_stages
from astro.calibration.input_sums import SumKind
from astro.calibration.token_weights import TokenWeights
from astro.config import Experts
from astro.model.activations import BlockLayers
from astro.model.block_call import BlockState, forward
from astro.model.clipped_rounding import InputClips, round_clipped
from astro.model.operands import names_of
from astro.model.recording import count_outputs, record
from astro.model.rounded_inputs import rounded_inputs
from astro.model.skeleton import Skeleton
from astro.storage.checkpoint import Checkpoint
from tests.support.architectures import IDS
from tests.support.dequantized import keys_of
from tests.support.models import naive_hessian

CPU = torch.device("cpu")
STATIC = ActivationScheme(4, "int", is_static=True)
# q and k have clips of their own; v reads what k reads.
ENDS = {
    "q_proj": (-1.5, 1.0), "k_proj": (-0.8, 1.2), "v_proj": (-0.8, 1.2), "o_proj": (-0.1, 0.1),
    "gate_proj": (-2.0, 2.0), "up_proj": (-1.0, 2.0), "down_proj": (-0.01, 0.02),
}  # fmt: skip


@dataclasses.dataclass
class Block:
    """The first block of the tiny Llama with such clips, and its layers' inputs as they are before they are rounded."""

    skeleton: Skeleton
    layers: BlockLayers
    hidden: torch.Tensor
    run: object

    def modules(self):
        return {name: self.skeleton.model.get_submodule(name) for name in self.layers.by_name}


@pytest.fixture
def block(llama):
    checkpoint, skeleton = Checkpoint.open(llama), Skeleton(llama, torch.float32)
    skeleton.load(skeleton.model, checkpoint.read(checkpoint.entries), CPU)
    hidden, calls = record(skeleton, IDS, count_outputs(skeleton, IDS[:1]))
    linears = skeleton.linear_layers(0, keys_of(skeleton, checkpoint, 0))[0]
    clipped = [
        dataclasses.replace(linear, clips=InputClips.between(*ENDS[linear.name.rpartition(".")[2]], 4))
        for linear in linears
    ]
    layers = BlockLayers(skeleton.model, clipped)
    return Block(skeleton, layers, hidden, lambda state: forward(skeleton.blocks[0], state, calls[0]))


def rounded(name, X):
    return round_clipped(X, torch.tensor(ENDS[name.rpartition(".")[2]]), 4)


def short(groups):
    return [[name.rpartition(".")[2] for name in names_of(group)] for group in groups]


@torch.no_grad()
def test_every_layer_multiplies_and_sums_what_its_own_clips_leave(block):
    calls = {}
    for name, module in block.modules().items():
        module.register_forward_hook(lambda m, args, output, name=name: calls.update({name: (args[0], output)}))
    kind = lambda operand: SumKind(operand.grid(STATIC), has_rounding_drift=True)  # noqa: E731
    statistics = BlockStatistics(block.layers, CPU, TokenWeights("none"), kind, STATIC)
    for _ in range(2):
        with rounded_inputs(block.layers, STATIC):
            statistics.run(lambda: block.run(BlockState(block.hidden)), "c0000")
    for name, (X, Y) in calls.items():
        expected = nn.functional.linear(rounded(name, X), block.layers.weight(name))
        torch.testing.assert_close(Y, expected, atol=1e-5, rtol=1e-5)
    groups = [["q_proj"], ["k_proj", "v_proj"], ["o_proj"], ["gate_proj"], ["up_proj"], ["down_proj"]]
    assert short(statistics.input_groups) == groups
    for known in statistics.finish_(Experts(), []):
        X = calls[known.names[0]][0].flatten(0, 1)
        X_hat = rounded(known.names[0], X)
        torch.testing.assert_close(known.H.double(), naive_hessian(X_hat, repeats=2), rtol=1e-3, atol=1e-5)
        assert known.rounding.drift.abs().max() > 0


@torch.no_grad()
def test_groups_of_one_input_are_in_one_stage(block):
    stages = input_stages(block.layers, lambda: block.run(BlockState(block.hidden)))
    expected = [[["q_proj"], ["k_proj", "v_proj"]], [["o_proj"]], [["gate_proj"], ["up_proj"]], [["down_proj"]]]
    assert [short(stage) for stage in stages] == expected


def test_every_group_has_token_weights_of_its_own(block):
    state = BlockState(block.hidden)
    with torch.no_grad():
        passed = pass_back(block.layers, block.run, state, BlockState(torch.randn_like(block.hidden)))
    firsts = ["q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(name.rpartition(".")[2] for name in passed.energies) == sorted(firsts)
    energies = list(passed.energies.values())
    assert all(not torch.equal(energies[0], other) for other in energies[1:])
