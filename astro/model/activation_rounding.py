"""The inputs of quantized layers as a server rounds them: per token, dynamic, symmetric, or between learned clips.

A token is a row of the last dimension. Its scale comes from its largest magnitude while the server computes:

    s = max(max |x| / m, s_min)        q = round(x / s), ties to even        x̂ = s q

| grid         | m   | s_min         | as in                                                             |
|--------------|-----|---------------|-------------------------------------------------------------------|
| int8         | 127 | 1e-30         | `process_input` of Humming, which vLLM serves such inputs with     |
| int4         | 7   | 1e-30         | the same                                                          |
| float8 E4M3  | 448 | 1 / (448·512) | `scaled_fp8_quant` of vLLM with a scale a token                   |

|q| never exceeds m, so that the kernels' limits (−128 or −8 at the lower end) are never reached. compressed-tensors'
own simulation divides by 127.5 and 7.5 instead, which no kernel does. A server multiplies the integers themselves and
scales the product in float32; here x̂ is kept in the dtype of the forward, which in bfloat16 rounds it once more, as it
does the weights.
"""

import torch

from astro.activation_config import ActivationScheme
from astro.model.clipped_rounding import InputClips

__all__ = ["InputGrid", "round_activations"]

InputGrid = ActivationScheme | InputClips
"""A grid that says all that rounding needs: a scale for each token as it comes, or a layer's own clips."""

_LEAST_INT_SCALE = 1e-30
_FP8 = torch.float8_e4m3fn
_FP8_MAXIMUM = 448.0
_LEAST_FP8_SCALE = 1 / (_FP8_MAXIMUM * 512)


def round_activations(X: torch.Tensor, grid: InputGrid) -> torch.Tensor:
    """Return what a server makes of inputs: each token on a grid with a scale of its own, or all between two clips.

    It is computed in float32, or in float64 where the inputs are. Nothing waits for the device.

    Args:
        X: Inputs of a layer [..., C], any float dtype. A token with NaN or Inf becomes NaN as a whole; between clips
            NaN stays NaN.
        grid: The grid.

    Returns:
        The rounded inputs, in the shape and dtype of the inputs.
    """
    if not X.numel():
        return X
    if isinstance(grid, InputClips):
        return grid.round(X)
    exact = X.to(torch.promote_types(X.dtype, torch.float32))
    largest = exact.abs().amax(-1, keepdim=True)
    if grid.type == "float":
        scale = (largest / _FP8_MAXIMUM).clamp_(min=_LEAST_FP8_SCALE)
        q = (exact / scale).to(_FP8).to(exact.dtype)
    else:
        scale = (largest / (2 ** (grid.bits - 1) - 1)).clamp_(min=_LEAST_INT_SCALE)
        q = (exact / scale).round_()
    return q.mul_(scale).to(X.dtype)
