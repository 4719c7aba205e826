"""How much the errors on each calibration token count in a layer's Hessian.

    H = Σ_t w_t x_t x_tᵀ / Σ_t w_t

Where all tokens count alike, the few with massive activations (the first of a sequence, delimiters) own H, and a layer
serves all others badly. Two kinds of weights take that away; neither changes formats, inference or parallelism:

    norm    w_t = C / ‖x_t‖²                       every token has the same energy; costs nothing
    loss    w_t = e_t^½, e_t = mean of (∂ℓ/∂z_t)²  over the outputs z of all layers that read x; costs a backward

ℓ is the cross-entropy of the source model on the calibration text's own next tokens. To the first power e_t is the
diagonal of the Fisher information (GuidedQuant, arXiv 2505.07004); its root measures better.
Shapes: T tokens, C columns (inputs), R rows (outputs).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch.utils.hooks import RemovableHandle

from astro.errors import UnsupportedError
from astro.model.activations import BlockLayers
from astro.model.block_call import BlockState
from astro.model.gradients import gradients
from astro.model.operands import Inputs, Operand, share_input

__all__ = [
    "OUTPUT", "Kind", "PassedBack", "TokenWeights", "effective_tokens", "group_key", "loss_weights", "norm_weights",
    "output_energy", "pass_back", "typical_energy",
]  # fmt: skip

Kind = Literal["loss", "norm", "none"]
"""What tokens are weighted by; `none` lets all count alike."""

OUTPUT = "output"
"""Key of the weights at a block's output, beside those of its input groups."""
_LEAST_ENERGY = 1e-9
"""Energy of a token, relative to the mean, below which its weight by the norm does not grow any more."""
_EXPONENT = 0.5
"""Power of a token's energy that is its weight: measured against 0.35 and 1 at 3 and 4 bits."""


@dataclasses.dataclass(frozen=True)
class TokenWeights:
    """The weights of all calibration tokens at the layers of one block.

    Attributes:
        kind: What tokens are weighted by.
        measured: Weights by the loss, float32 [T], by chunk and `group_key` of an input group, or `OUTPUT`, on the
            device of the inputs. Where an input group has none its tokens are weighted by their norm.
        energies: Energy of the loss's gradient at an input group or an expert, by its first layer; of all calibration
            tokens together, see `typical_energy`.
    """

    kind: Kind
    measured: Mapping[tuple[str, str], torch.Tensor] = dataclasses.field(default_factory=dict)
    energies: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def kind_of(self, operand: Operand) -> Kind:
        """Return what the tokens of an input group are weighted by.

        Args:
            operand: First operand of the input group.
        """
        return "norm" if self.kind == "loss" and group_key(operand) not in self._keys else self.kind

    def is_by_loss(self, operand: Operand) -> bool:
        """Tell whether the tokens of an input group are weighted by the loss.

        Args:
            operand: First operand of the input group.
        """
        return self.kind_of(operand) == "loss"

    def energy_of(self, operand: Operand) -> float | None:
        """Return the `typical_energy` at an input group; None where the loss was not measured there.

        Args:
            operand: First operand of the input group.
        """
        return self.energies.get(operand.names[0], 0.0) if self.is_by_loss(operand) else None

    @functools.cached_property
    def _keys(self) -> set[str]:
        return {key for _, key in self.measured}

    def of(self, operand: Operand, chunk: str, inputs: Inputs) -> torch.Tensor | None:
        """Return the weights of one chunk's tokens, float32 [T]; None where all count alike.

        Args:
            operand: First operand of the input group.
            chunk: Name of the chunk.
            inputs: Inputs of the operand in a forward of that chunk.
        """
        if self.kind == "none":
            return None
        X, tokens = inputs.X, inputs.tokens
        measured = self.measured.get((chunk, group_key(operand))) if self.kind == "loss" else None
        if measured is None or (operand.expert is not None and tokens is None):
            return norm_weights(X.reshape(-1, X.shape[-1]))
        return measured if tokens is None else measured[tokens]

    def of_output(self, chunk: str, Y: torch.Tensor) -> torch.Tensor:
        """Return the weights of one chunk's tokens at the block's output, float32 [B · T].

        Args:
            chunk: Name of the chunk.
            Y: What the block is to return, [B, T, ...].
        """
        if self.kind == "none":
            return torch.ones(Y.shape[0] * Y.shape[1], device=Y.device)
        measured = self.measured.get((chunk, OUTPUT))
        return norm_weights(Y.flatten(2).flatten(0, 1)) if measured is None else measured


def output_energy(gradient: torch.Tensor) -> torch.Tensor:
    """Return the energy of every token at a block's output, float32 [B · T].

    Args:
        gradient: Gradient of the loss there, [B, T, ...].
    """
    return gradient.float().square().flatten(2).mean(-1).flatten()


def group_key(operand: Operand) -> str:
    """Return what names the weights of an input group: its first layer, or the parameter that holds the experts.

    Which expert a token goes to may change once the layers before it are quantized. So a token has one weight at all
    experts of a layer.

    Args:
        operand: First operand of the input group.
    """
    return operand.names[0] if operand.expert is None else operand.parameter


def norm_weights(X: torch.Tensor) -> torch.Tensor:
    """Return weights that give every token the same energy, float32 [T]; 0 for a token whose inputs are all 0.

    Args:
        X: Inputs of a layer [T, C] in any float dtype.
    """
    energy = X.float().square().mean(-1)
    # A token that is nearly silent would have a weight beside which all others vanish.
    floor = (_LEAST_ENERGY * energy.mean()).clamp(min=1e-30)
    return torch.where(energy > 0, torch.maximum(energy, floor).reciprocal(), 0.0)


def loss_weights(energy: torch.Tensor) -> torch.Tensor | None:
    """Return the weights that follow from the energy of the loss's gradient, float32 [T], their mean being 1.

    Args:
        energy: Mean of (∂ℓ/∂z_t)² over the outputs of an input group, for all calibration tokens, float32 [T].

    Returns:
        The weights; None where they cannot be told: an energy is not finite, or all are 0.
    """
    scale = energy.double().mean()
    if not bool(torch.isfinite(scale)) or not bool(scale > 0):
        return None
    weights = (energy.double() / scale).pow(_EXPONENT)
    return (weights / weights.mean()).float()


def typical_energy(energies: Sequence[torch.Tensor], num_tokens: int) -> float:
    """Return (Σ √e_t)² / (n N): of n tokens that a layer sees out of N.

    It is the squared mean of the weights by the loss before these are brought to the mean 1, times the share of the
    tokens that the layer sees. A few tokens of very large energy, which own the mean of e_t, do not own it.

    Args:
        energies: Energies e_t of all tokens that the layer sees, in some pieces.
        num_tokens: Number N of all tokens.
    """
    seen = sum(map(len, energies))
    roots = sum(float(energy.double().sqrt().sum()) for energy in energies)
    return roots**2 / (seen * num_tokens) if seen else 0.0


def effective_tokens(weights: torch.Tensor) -> float:
    """Return how many tokens of equal weight would say as much: (Σ w)² / Σ w².

    Args:
        weights: Weights of all tokens [T].
    """
    exact = weights.double()
    return float(exact.sum().square() / exact.square().sum())


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
