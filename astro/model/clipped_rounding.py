"""Inputs of a layer between two learned clips, uniformly rounded, with gradients for the inputs and for the clips.

Source: Nrusimha et al., arXiv 2404.03605. n = 2^b − 1 is the number of steps between the clips c⁻ and c⁺:

(1) s = n / (c⁺ − c⁻)
(2) v = (clamp(x, c⁻, c⁺) − c⁻) · s,  q = rint(v),  x̂ = q / s + c⁻
(3) ∂x̂/∂x  = 1 for c⁻ < x < c⁺, else 0                              (straight through the rounding)
(4) ∂x̂/∂c⁺ = 1 for x ≥ c⁺, 0 for x ≤ c⁻, else (q − v) / n           (clipped at the end; what s gives)
(5) ∂x̂/∂c⁻ = 1 for x ≤ c⁻, 0 for x ≥ c⁺, else (v − q) / n

(3) to (5) are the exact derivatives of x̂ = clamp(x, c⁻, c⁺) + (q − v) (c⁺ − c⁻) / n with q − v held fixed.
"""

import dataclasses
from typing import Any, Self

import torch
from torch.autograd.function import once_differentiable

from astro.errors import CheckpointError
from astro.linalg import compiled

__all__ = ["InputClips", "round_clipped"]


@dataclasses.dataclass(frozen=True)
class InputClips:
    """The fixed grid of a layer's inputs, as readers want it told: x̂ = (p − z) · scale, −2^(b−1) ≤ p < 2^(b−1).

    The zero point z is no integer, because c⁻ lies anywhere. Both numbers are float32, so that they are the same here
    and where they are read back from a file.

    Attributes:
        bits: Width b of one input.
        scale: Distance 1/s between two levels.
        zero_point: The zero point z, −2^(b−1) − c⁻ s.
    """

    bits: int
    scale: float
    zero_point: float

    @classmethod
    def between(cls, low: float, high: float, bits: int) -> Self:
        """Return the grid between two clips.

        Args:
            low: The clip c⁻.
            high: The clip c⁺.
            bits: Width of one input.

        Raises:
            CheckpointError: The first clip is not below the second, or one is not finite.
        """
        scale = _as_float32((high - low) / ((1 << bits) - 1))
        if not (0 < scale < float("inf") and abs(low) < float("inf")):
            raise CheckpointError(f"clips are {low:g} and {high:g}, expected two numbers, the first below the second")
        return cls(bits, scale, _as_float32(-(1 << (bits - 1)) - low / scale))

    @property
    def low(self) -> float:
        """The clip c⁻, as far as float32 holds the scale and the zero point."""
        return (-(1 << (self.bits - 1)) - self.zero_point) * self.scale

    @property
    def high(self) -> float:
        """The clip c⁺."""
        return self.low + ((1 << self.bits) - 1) * self.scale

    def round(self, X: torch.Tensor) -> torch.Tensor:
        """Return inputs as they are between the clips on the grid, by equations (1) and (2). No device is waited for.

        Args:
            X: Inputs of a layer [..., C], any float dtype.
        """
        ends = [torch.full((), clip, dtype=torch.float32, device=X.device) for clip in (self.low, self.high)]
        return round_clipped(X, torch.stack(ends), self.bits)


def round_clipped(x: torch.Tensor, clips: torch.Tensor, bits: int) -> torch.Tensor:
    """Clamp and round inputs to 2^bits levels between two learned clips, equations (1) and (2).

    Args:
        x: Inputs of a layer [..., C].
        clips: c⁻ and c⁺ [2], which get gradients by (4) and (5).
        bits: Number of bits.

    Returns:
        The rounded inputs x̂ [..., C], in the dtype of `x`.
    """
    rounded: torch.Tensor = _RoundClipped.apply(x, clips, 2**bits - 1)  # type: ignore[no-untyped-call]
    return rounded


class _RoundClipped(torch.autograd.Function):
    """Equations (1) and (2) forward, (3) to (5) backward. It keeps x alone, and rounds it again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clips: torch.Tensor, steps: int) -> torch.Tensor:
        ctx.save_for_backward(x, clips)
        ctx.steps, ctx.gradients = steps, compiled.carried(_gradients)
        return _rounded(x.detach(), clips.detach(), steps)  # a compiler asks what is not detached for its gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, clips = (X.detach() for X in ctx.saved_tensors)
        (gradient,) = gradients
        return *ctx.gradients(x, clips, gradient, ctx.steps), None


@compiled.fused
def _rounded(x: torch.Tensor, clips: torch.Tensor, steps: int) -> torch.Tensor:
    """Return x̂ of equation (2), in the dtype of x."""
    v, scale = _scaled(x, clips, steps)
    return (v.round_() / scale + clips[0]).to(x.dtype)  # round: halves to even, as rint


@compiled.fused
def _gradients(
    x: torch.Tensor, clips: torch.Tensor, gradient: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients for x and for both clips [2], equations (3) to (5), from that of x̂."""
    v, _ = _scaled(x, clips, steps)
    low, high = v <= 0, v >= steps
    g = gradient.to(v.dtype)
    of_rounding = ((v.round() - v) * g).sum() / steps  # Σ g (q − v) / n
    # Clipped elements have q = v, and move their clip alone.
    of_low, of_high = g.masked_fill(~low, 0).sum(), g.masked_fill(~high, 0).sum()
    of_clips = torch.stack((of_low - of_rounding, of_high + of_rounding))
    return gradient.masked_fill(low | high, 0), of_clips.to(clips.dtype)


def _scaled(x: torch.Tensor, clips: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return v of equation (2) and s, in float32 at least."""
    dtype = torch.promote_types(x.dtype, clips.dtype)
    low, high = clips.to(dtype)
    scale = steps / (high - low)
    v = (x.to(dtype).clamp(low, high) - low) * scale
    return v.clamp_(0, steps), scale  # the product of the last element may be a little above n


def _as_float32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()
