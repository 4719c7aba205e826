"""The loss's gradient on its way back through a block, and its energy at the layers' outputs.

    e_t = mean of (∂ℓ/∂z_t)² over the outputs z of all layers that read one input

These energies become weights of tokens, see `token_weights`. Shapes: B sequences of T tokens.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch.utils.hooks import RemovableHandle

from astro.calibration.token_weights import group_key
from astro.errors import UnsupportedError
from astro.model.activations import BlockLayers
from astro.model.block_call import BlockState
from astro.model.gradients import gradients
from astro.model.operands import Inputs, Operand, share_input

__all__ = ["PassedBack", "pass_back"]


@dataclasses.dataclass(frozen=True)
class PassedBack:
    """The loss's gradient at the input of a block, and what it was on the way there.

    Attributes:
        gradient: Gradient at the block's input.
        energies: Mean of the squared gradient over the outputs of every input group, float32 [B · T], by `group_key`.
            Of experts it is the sum over those that a token goes to; experts whose tokens cannot be told are left out.
        of_experts: That energy at each expert alone, of the tokens that go to it, float32, by the expert's first layer.
    """

    gradient: BlockState
    energies: Mapping[str, torch.Tensor]
    of_experts: Mapping[str, torch.Tensor]


def pass_back(
    layers: BlockLayers, action: Callable[[BlockState], BlockState], state: BlockState, gradient: BlockState
) -> PassedBack:
    """Take the loss's gradient from the output of a block to its input, and measure it at the layers on the way.

    The block is run once more with gradients to its input alone; no weight gets one. What blocks hand to later ones
    besides hidden states, such as keys and values that layers share, has a gradient too.

    Args:
        layers: The layers of the block, which is loaded.
        action: A forward of the block, from the state before it to the one behind it.
        state: State before the block.
        gradient: Gradient of the loss at the block's output. Where it lacks a tensor of the state, that one has none.

    Raises:
        UnsupportedError: The block holds an operation that has no gradient.
    """
    hidden = state.hidden
    num_tokens = hidden.shape[0] * hidden.shape[1]
    energies = _Energies(torch.zeros(num_tokens, dtype=torch.float32, device=hidden.device))
    try:
        with gradients(hidden.device):
            start = BlockState(_leaf(hidden), {name: _leaf(other) for name, other in state.others.items()})
            with layers.observed_products(energies.observe):
                output = action(start)
            before = _gradient(output, start, gradient)
    finally:
        energies.close()
    return PassedBack(before, energies.means(), energies.of_experts())


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _gradient(output: BlockState, start: BlockState, gradient: BlockState) -> BlockState:
    """Return the gradient at the input of a block; a tensor that the loss does not depend on is left out."""
    ends, at_ends = [output.hidden], [gradient.hidden.to(output.hidden.dtype)]
    for name, other in output.others.items():
        if name in gradient.others and other.requires_grad:
            ends.append(other)
            at_ends.append(gradient.others[name].to(other.dtype))
    others = {name: other for name, other in start.others.items() if other.requires_grad}
    of_hidden, *of_others = torch.autograd.grad(ends, [start.hidden, *others.values()], at_ends, allow_unused=True)
    if of_hidden is None:
        raise UnsupportedError("no gradient passes through this block: its output does not depend on its input")
    return BlockState(of_hidden, {name: g for name, g in zip(others, of_others, strict=True) if g is not None})


class _Energies:
    """Sums of squared gradients at the outputs of a block's input groups, token by token."""

    def __init__(self, zeros: torch.Tensor) -> None:
        self._zeros = zeros
        self._sums: dict[str, torch.Tensor] = {}
        self._of_experts: dict[Operand, torch.Tensor] = {}
        self._num_outputs: dict[str, int] = {}
        self._unknown: set[str] = set()
        self._last: tuple[torch.Tensor, Operand, str] | None = None
        self._hooks: list[RemovableHandle] = []

    def close(self) -> None:
        """Let go of the graph. Its nodes hold the hooks, and these the graph: together they would never be freed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._last = None

    def observe(self, operand: Operand, inputs: Inputs, Z: torch.Tensor) -> None:
        """Take note of a product, and ask autograd for the gradient at it."""
        key, tokens = group_key(operand), inputs.tokens
        if operand.expert is None:
            if self._last is not None and share_input(operand, inputs.X, self._last[1], self._last[0]):
                key = self._last[2]
        elif tokens is None:
            self._unknown.add(key)
        self._last = (inputs.X, operand, key)
        if not Z.requires_grad or key in self._unknown:
            return
        # A token is counted at each of its experts, so that their outputs are not added up as layers' are.
        known = self._num_outputs.get(key, 0)
        self._num_outputs[key] = Z.shape[-1] + (known if operand.expert is None else 0)

        def add(g: torch.Tensor) -> None:
            energy = g.reshape(-1, g.shape[-1]).float().square().sum(-1)
            if key not in self._sums:
                self._sums[key] = self._zeros.clone()
            sums = self._sums[key]
            sums.add_(energy) if tokens is None else sums.index_add_(0, tokens, energy)
            if operand.expert is not None:
                self._of_experts[operand] = energy / g.shape[-1]

        self._hooks.append(Z.register_hook(add))

    def means(self) -> dict[str, torch.Tensor]:
        """Return the mean over outputs of every input group whose tokens are all known."""
        return {key: sums / self._num_outputs[key] for key, sums in self._sums.items() if key not in self._unknown}

    def of_experts(self) -> dict[str, torch.Tensor]:
        """Return the mean over outputs of every expert whose tokens are all known."""
        known = (operand for operand in self._of_experts if operand.parameter not in self._unknown)
        return {operand.names[0]: self._of_experts[operand] for operand in known}
