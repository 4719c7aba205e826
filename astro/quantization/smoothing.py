"""Smoothing: the factors by which outlier channels of a layer's input move into its weights.

With a diagonal M of positive factors m, one for each channel,

    X Wᵀ = (X M⁻¹) (W M)ᵀ

so that the layer may get the input X M⁻¹, which is easier to round, if its weights become W M. What makes the input
must make it smaller by M for nothing; `astro.model.scaling_places` finds out where that is possible.

Published of ASER (arXiv 2411.07762): the f channels of largest mean|x| · mean|w| are brought down, all others stay.
Ours: how far. Each of them comes down to the largest mean|x| of the other channels, and no channel is made larger.
Published of SmoothQuant (arXiv 2211.10438): m = max|x|^α / max|w|^(1−α) for every channel. Ours: the factors are
divided by their geometric mean. That changes nothing for inputs that are rounded token by token, and keeps them in the
range of 16-bit floats.

Ours as well: all factors are powers of two. A float that is multiplied by a power of two keeps all of its digits. So
a smoothed model computes what it computed before to the last bit, and no gain of a norm is rounded in its 16 bits. A
factor is off by 2^½ at most, which is half a bit of one channel.

Shapes: R rows, C columns (channels).
"""

from collections.abc import Sequence

import torch

from astro.activation_config import Activations
from astro.calibration.channel_statistics import ChannelStatistics, ChannelSums

__all__ = [
    "aser_factors", "column_statistics", "powers_of_two", "row_factors", "smoothquant_factors",
]  # fmt: skip

_MOST_EXPONENT = 14
"""Largest power of two of a factor. Weights of 1 become 2¹⁴, which float16 still holds."""


def aser_factors(activation_mean: torch.Tensor, weight_mean: torch.Tensor, outlier_channels: int) -> torch.Tensor:
    """Return the factors of ASER's rule, float32 [C], at least 1.

    Args:
        activation_mean: Mean |x| of each channel, float32 [C].
        weight_mean: Mean |w| of each column, float32 [C].
        outlier_channels: Number f of channels that are brought down; of fewer channels that are ever used, all but one.
    """
    count = min(outlier_channels, int((activation_mean > 0).sum()) - 1)
    factors = torch.ones_like(activation_mean)
    if count < 1:
        return factors
    outliers = (activation_mean * weight_mean).topk(count).indices
    others = torch.ones_like(activation_mean, dtype=torch.bool).index_fill_(0, outliers, False)
    level = activation_mean[others].max()
    if not bool(level > 0):
        return factors
    return factors.index_copy_(0, outliers, (activation_mean[outliers] / level).clamp(min=1.0))


def smoothquant_factors(activation_max: torch.Tensor, weight_max: torch.Tensor, strength: float) -> torch.Tensor:
    """Return the factors of SmoothQuant's rule over their geometric mean, float32 [C].

    Args:
        activation_max: Largest |x| of each channel, float32 [C].
        weight_max: Largest |w| of each column, float32 [C].
        strength: Exponent α of the activations, from 0 to 1.

    Returns:
        The factors; 1 for a channel whose inputs or weights are all 0.
    """
    is_used = (activation_max > 0) & (weight_max > 0)
    if not bool(is_used.any()):
        return torch.ones_like(activation_max)
    tiny = torch.finfo(torch.float32).tiny
    logarithms = strength * activation_max.clamp(min=tiny).log() - (1 - strength) * weight_max.clamp(min=tiny).log()
    return torch.where(is_used, (logarithms - logarithms[is_used].mean()).exp(), 1.0)


def powers_of_two(factors: torch.Tensor) -> torch.Tensor:
    """Return the nearest powers of two, float32 of the same shape.

    Args:
        factors: Positive factors.
    """
    exponents = factors.double().log2().round().clamp(-_MOST_EXPONENT, _MOST_EXPONENT)
    return torch.exp2(exponents).float()


def column_statistics(weights: Sequence[torch.Tensor]) -> ChannelStatistics:
    """Return how large the weights of each column are, over the rows of all layers that read an input.

    Args:
        weights: Weights [R_m, C] of the layers, any float dtype.
    """
    sums = ChannelSums(weights[0].shape[1], weights[0].device)
    for weight in weights:
        sums.add_(weight)
    return sums.finish()


def row_factors(
    settings: Activations, inputs: ChannelStatistics, weights: ChannelStatistics, rows: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Return the factors of what makes an input, float64 [R], by the rule that is configured.

    Channels that the same row makes, as heads of queries that share one of values, get one factor, and each of them
    counts as an outlier channel.

    Args:
        settings: The rule and its settings.
        inputs: How large the channels of the input are.
        weights: How large the columns of the weights are that read it.
        rows: Row that makes each channel, int64 [C].
        num_rows: Number R of rows.
    """
    activation, weight = inputs.tied(rows, num_rows), weights.tied(rows, num_rows)
    if settings.smoothing == "aser":
        of_a_row = int(torch.bincount(rows).max())
        factors = aser_factors(activation.mean, weight.mean, max(settings.outlier_channels // of_a_row, 1))
    else:
        factors = smoothquant_factors(activation.maximum, weight.maximum, settings.smoothing_strength)
    return powers_of_two(factors).double()
