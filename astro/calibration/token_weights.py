"""How much the errors on each calibration token count in a layer's Hessian.

    H = Σ_t w_t x_t x_tᵀ / Σ_t w_t

Where all tokens count alike, the few with massive activations (the first of a sequence, delimiters) own H, and a layer
serves all others badly. Two kinds of weights take that away; neither changes formats, inference or parallelism:

    norm    w_t = C / ‖x_t‖²                       every token has the same energy; costs nothing
    loss    w_t = e_t^½, e_t = mean of (∂ℓ/∂z_t)²  over the outputs z of all layers that read x; costs a backward

ℓ is the cross-entropy of the source model on the calibration text's own next tokens. To the first power e_t is the
diagonal of the Fisher information (GuidedQuant, arXiv 2505.07004); its root measures better.
Shapes: T tokens, C columns (inputs).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from astro.model.operands import Inputs, Operand

__all__ = [
    "OUTPUT", "Kind", "TokenWeights", "effective_tokens", "group_key", "loss_weights", "norm_weights",
    "output_energy", "typical_energy",
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

    def energy_of(self, operand: Operand) -> float | None:
        """Return the `typical_energy` at an input group; None where the loss was not measured there.

        Args:
            operand: First operand of the input group.
        """
        return self.energies.get(operand.names[0], 0.0) if self.kind_of(operand) == "loss" else None

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
