"""The squared error of a layer's outputs, where its weights are quantized and its inputs may be rounded too.

Shapes: B input groups side by side, R rows, C columns, N sampled tokens.
"""

import torch

from astro.linalg.symmetric import squared_error
from astro.quantization.grid import QuantizedLinear
from astro.quantization.recipe import InputMoments

__all__ = ["output_error"]


def output_error(
    inputs: InputMoments, W: torch.Tensor, quantized: QuantizedLinear, error: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the squared error of each row's outputs, and what it is relative to, ‖wX‖².

    Where inputs stay as they are, the error is ‖(ŵ − w)X‖², as the solver has measured it with H. Where they are
    rounded it is ‖ŵX̂ − wX‖², what weights and rounding lose together. Each of its terms alone can be many times as
    large, so that it is measured on the sampled tokens themselves, and not put together from means.

    Args:
        inputs: What calibration learned of the inputs.
        W: The weights w whose outputs are wanted, some rows, float32 [B, R, C]: the original ones, or those that make
            up for errors made before.
        quantized: The rows as they were quantized, [B, R, C].
        error: ‖(ŵ − w*)X̂‖² of each row as the solver has measured it, float32 [B, R]; w* is w, but for what makes up
            for rounding. It stays the error of input groups without statistics.

    Returns:
        The errors and the energies, float32 [B, R] each.
    """
    if inputs.rounding is None:
        return error, squared_error(W, inputs.H)
    W_hat = quantized.dequantize()
    measured, energy = torch.zeros_like(error), torch.zeros_like(error)
    for tokens in inputs.rounding.sample.split(W.shape[-1], dim=-2):
        X_rounded, lost = tokens.mT.chunk(2, dim=-2)
        wanted = W @ (X_rounded + lost)
        energy += wanted.square().sum(-1)
        measured += (W_hat @ X_rounded).sub_(wanted).square_().sum(-1)
    if any(inputs.lacks_statistics):
        is_lacking = torch.tensor(list(inputs.lacks_statistics), device=W.device).unsqueeze(-1)
        measured = torch.where(is_lacking, error, measured)
        energy = torch.where(is_lacking, squared_error(W, inputs.H), energy)
    return measured, energy
