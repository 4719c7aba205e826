"""The squared error of a layer's outputs, where its weights are quantized and its inputs may be rounded too.

Shapes: B input groups side by side, R rows, C columns, N sampled tokens.
"""

from collections.abc import Sequence

import torch

from astro.calibration.input_sums import RoundingMoments
from astro.linalg.symmetric import squared_error
from astro.model.low_rank import LowRank
from astro.quantization.grid import QuantizedLinear
from astro.quantization.recipe import InputMoments

__all__ = ["output_error", "sampled_errors"]


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
    measured, _, energy = sampled_errors(inputs.rounding, W, quantized.dequantize())
    if any(inputs.lacks_statistics):
        is_lacking = torch.tensor(list(inputs.lacks_statistics), device=W.device).unsqueeze(-1)
        measured = torch.where(is_lacking, error, measured)
        energy = torch.where(is_lacking, squared_error(W, inputs.H), energy)
    return measured, energy


def sampled_errors(
    rounding: RoundingMoments, W: torch.Tensor, W_hat: torch.Tensor, corrections: Sequence[LowRank] = ()
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Measure the outputs of quantized rows with rounded inputs, without and with corrections, on the sampled tokens.

    A correction B A reads the inputs as they are, as servers compute it beside the layer, so that the error is
    ‖ŵX̂ + bAX − wX‖².

    Args:
        rounding: The sampled tokens.
        W: The weights w whose outputs are wanted, float32 [B, R, C].
        W_hat: The quantized weights ŵ, float32 [B, R, C].
        corrections: For each input group the correction of these rows, in any float dtype; empty for none.

    Returns:
        The errors of each row without its correction and with it, and the energies ‖wX‖², float32 [B, R] each.
    """
    before, after, energy = (W.new_zeros(W.shape[:-1]) for _ in range(3))
    for tokens in rounding.sample.split(W.shape[-1], dim=-2):
        X_rounded, lost = tokens.mT.chunk(2, dim=-2)
        X = X_rounded + lost
        wanted = W @ X
        energy += wanted.square().sum(-1)
        missed = (W_hat @ X_rounded).sub_(wanted)
        before += missed.square().sum(-1)
        if corrections:
            for of_group, of_input, correction in zip(missed, X, corrections, strict=True):
                of_group.add_(correction.B.to(X.dtype) @ (correction.A.to(X.dtype) @ of_input))
            after += missed.square_().sum(-1)
    return before, after if corrections else before, energy
