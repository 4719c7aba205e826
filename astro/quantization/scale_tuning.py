"""Scales of a block's layers are tuned until the block as a whole returns what it is to return.

The solve puts each input group on its grid by itself. It does not see that errors of one layer add to those of the
next, nor what softmax and activation functions make of them. So when all layers of a block are solved, the scale of
each group is multiplied by a factor that gradient descent finds, while integers and zero points stay:

    ŵ = (q − z) s (1 + p)                                                                  (1)
    E(p) = Σ_t w_t ‖f(x_t; ŵ) − y_t‖² / Σ_t w_t ‖f(x_t; ŵ₀) − y_t‖²                        (2)
    ∂E/∂p_k = s_k Σ_{i in k} (∂E/∂ŵ_i) (q_i − z_k)                                         (3)

f is the block with its quantized layers, y its wanted outputs, w the tokens' weights, ŵ₀ the weights that the solve
left. Adam (arXiv 1412.6980) takes the steps. Factors stay well above 0, so that no scale changes its sign.
Shapes: B sequences, T tokens, R rows, C columns, G groups of a row.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from astro.errors import UnsupportedError
from astro.linalg.tiling import near_rows
from astro.model.activations import BlockLayers
from astro.model.gradients import gradients
from astro.quantization.grid import QuantizedLinear, grouped

__all__ = ["TunedScales", "TuningText", "tune_scales"]

_STRIDE = 0.1
"""The first step moves the weight of the integer 2^(bits−1) by this share of a grid step, over the root of the number
of steps. Measured with 40 and 160 steps of 512 tokens at 2, 3 and 4 bits."""
_REACH = 1.0
"""Most that the size of the first step is, times the number of steps. Steps become smaller, down to none, so that half
of this is about the farthest that a factor gets from 1."""
_MOMENTS = (0.9, 0.95)
"""Shares that Adam keeps of its moments: a second moment over twenty steps, because there are so few."""
_TINY = torch.finfo(torch.float32).tiny


@dataclasses.dataclass(frozen=True)
class TuningText:
    """A text that scales are tuned on, mostly one sequence.

    Attributes:
        forward: Returns the output of the block, as it is loaded, for the text, [B, T, ...].
        wanted: What the output is to be, [B, T, ...].
        weights: How much each token counts, float32 [B · T].
    """

    forward: Callable[[], torch.Tensor]
    wanted: torch.Tensor
    weights: torch.Tensor


@dataclasses.dataclass(frozen=True)
class TunedScales:
    """What came of tuning.

    Attributes:
        layers: Every layer by name, with tuned scales, or as it was where these are no better.
        error_before: Weighted error of the block's outputs before, relative to the weighted energy of the wanted ones;
            None where it is no number.
        error_after: The same with the layers that are returned.
        reason: Why nothing was tuned; empty where it was.
    """

    layers: Mapping[str, QuantizedLinear]
    error_before: float | None
    error_after: float | None
    reason: str = ""


def tune_scales(
    block: BlockLayers,
    solved: Mapping[str, QuantizedLinear],
    texts: Sequence[TuningText],
    steps: int,
    scale_dtype: torch.dtype,
) -> TunedScales:
    """Tune the scales of a block's layers by the error of its outputs.

    Args:
        block: The layers of the block, which is loaded. It computes with the layers that are returned afterwards.
        solved: Every quantized layer by name, on the block's device.
        texts: What is tuned on, one in each step, in turn.
        steps: Number of steps.
        scale_dtype: Dtype in which scales are stored; every new scale is exact in it.
    """
    mean = torch.cat([text.weights for text in texts]).mean().clamp(min=_TINY)
    texts = [dataclasses.replace(text, weights=text.weights / mean) for text in texts]
    factors = _Factors(block, solved, scale_dtype)
    factors.write_(solved)
    error, energy = _sum(texts, _differences), _sum(texts, lambda text: text.wanted)
    if not math.isfinite(error) or not math.isfinite(energy):
        return TunedScales(solved, None, None, "what the block returns is not finite")
    if error == 0:
        return TunedScales(solved, 0.0, 0.0, "the block returns what it is to return")
    if energy == 0:
        return TunedScales(solved, None, None, "the block is to return nothing but zeros")
    before = error / energy
    root = (error / sum(text.wanted.numel() for text in texts)) ** 0.5
    adam = torch.optim.Adam(factors.parameters(steps), betas=_MOMENTS)
    slower = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    try:
        for step in range(steps):
            adam.zero_grad()
            with block.differentiated(factors.add_gradient_):
                _pass_back(texts[step % len(texts)], root)
            adam.step()
            slower.step()
            factors.write_()
    except UnsupportedError as unsupported:
        factors.write_(solved)
        return TunedScales(solved, before, before, str(unsupported))
    after = _sum(texts, _differences)
    if after < error:
        return TunedScales(factors.tuned(), before, after / energy)
    factors.write_(solved)
    reason = "no step lowered the error" if math.isfinite(after) else "a gradient is not finite"
    return TunedScales(solved, before, before, reason)


def _sum(texts: Sequence[TuningText], of: Callable[[TuningText], torch.Tensor]) -> float:
    """Return the weighted sum over all tokens of the squared norms of something of theirs, [B, T, ...] of each text."""
    sums = [(of(text).float().square().flatten(2).sum(-1).flatten() * text.weights).sum() for text in texts]
    return float(torch.stack(sums).double().sum())


def _differences(text: TuningText) -> torch.Tensor:
    return text.forward().float() - text.wanted.float()


def _pass_back(text: TuningText, root: float) -> None:
    """Take the gradient of a text's error back to the weights.

    It is scaled so that float16 can hold it: Adam goes by ratios alone.
    """
    with gradients(text.wanted.device):
        output = text.forward()
        with torch.no_grad():
            weights = text.weights / (root * text.weights.numel() ** 0.5)
            gradient = (output.float() - text.wanted.float()).flatten(2) * weights.view(*output.shape[:2], 1)
        torch.autograd.backward([output], [gradient.view(output.shape).to(output.dtype)])


class _Factors:
    """The factors 1 + p of all scales of a block, and their gradients."""

    def __init__(self, block: BlockLayers, solved: Mapping[str, QuantizedLinear], scale_dtype: torch.dtype) -> None:
        self._block, self._solved, self._scale_dtype = block, solved, scale_dtype
        self._moves = {name: torch.zeros_like(layer.grid.scale) for name, layer in solved.items()}

    def parameters(self, steps: int) -> list[dict[str, Any]]:
        """Return the moves p, float32 [R, G] of each layer, by width, with the size of the first of some steps.

        Layers of one width are one group of Adam's, because a GPU moves a group at once.
        """
        by_bits: dict[int, list[torch.Tensor]] = {}
        for name, layer in self._solved.items():
            by_bits.setdefault(layer.grid.bits, []).append(self._moves[name])
        return [
            {"params": moves, "lr": min(_STRIDE / (2 ** (bits - 1) * steps**0.5), _REACH / steps)}
            for bits, moves in by_bits.items()
        ]

    def add_gradient_(self, name: str, gradient: torch.Tensor) -> None:
        """Take over the gradient at a layer's weight [R, C]."""
        layer, move = self._solved[name], self._moves[name]
        if move.grad is None:
            move.grad = torch.zeros_like(move)
        size = layer.grid.group_size
        for rows in near_rows(layer.Q):
            V = grouped(layer.Q[rows], size).float() - layer.grid.zero[rows].unsqueeze(-1)
            products = V.mul_(grouped(gradient[rows], size)).sum(-1)
            move.grad[rows] += products * layer.grid.scale[rows]  # eq. 3

    def tuned(self) -> dict[str, QuantizedLinear]:
        """The layers with their scales as they are now."""
        tuned = {}
        for name, layer in self._solved.items():
            scale = (layer.grid.scale * (1 + self._moves[name])).to(self._scale_dtype).float()  # eq. 1
            tuned[name] = dataclasses.replace(layer, grid=dataclasses.replace(layer.grid, scale=scale))
        return tuned

    def write_(self, layers: Mapping[str, QuantizedLinear] | None = None) -> None:
        """Let the block compute with layers; without any, with their scales as they are now."""
        for name, layer in (self.tuned() if layers is None else layers).items():
            layer.dequantize_into_(self._block.weight(name))
