"""Smoothing factors: which channels come down and how far, and what that does to inputs that are rounded by token."""

import pytest
import torch

from astro.activation_config import Activations
from astro.calibration.channel_statistics import ChannelStatistics, ChannelSums
from astro.quantization.smoothing import (
    aser_factors,
    column_statistics,
    powers_of_two,
    row_factors,
    smoothquant_factors,
)
from tests.support.models import correlated_inputs, random_weights

OUTLIERS, SIZES = [3, 17, 40], torch.tensor([30.0, 80.0, 200.0], dtype=torch.float64)


def inputs():
    X = correlated_inputs(256, 64)
    X = X / X.abs().mean(0)
    X[:, OUTLIERS] *= SIZES
    return X


def weights():
    """Weights that are smaller where inputs are larger, though not by as much, as in trained models."""
    W = random_weights(96, 64).double()
    W[:, OUTLIERS] /= SIZES.sqrt()
    return W


def rounded(X, bits):
    """Inputs as a server rounds them: one scale a token, symmetric."""
    scale = X.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (X / scale).round() * scale


def statistics(X):
    sums = ChannelSums(X.shape[-1], X.device)
    sums.add_(X.float())
    return sums.finish()


def factors(rule, X, W):
    seen, columns = statistics(X), column_statistics([W])
    if rule == "aser":
        return aser_factors(seen.mean, columns.mean, len(OUTLIERS))
    return smoothquant_factors(seen.maximum, columns.maximum, 0.5)


@pytest.mark.parametrize("rule", ["aser", "smoothquant"])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_of_inputs_with_outliers_costs_less(rule, bits):
    X, W = inputs(), weights()
    m = powers_of_two(factors(rule, X, W)).double()
    Y, smoothed = X @ W.T, X / m
    assert torch.equal(smoothed @ (W * m).T, Y), "powers of two change no bit"
    plain, after = (torch.linalg.vector_norm(Y_hat - Y) for Y_hat in (
        rounded(X, bits) @ W.T, rounded(smoothed, bits) @ (W * m).T,
    ))  # fmt: skip
    assert after < 0.7 * plain


def test_aser_brings_outliers_down_to_the_largest_of_the_others():
    X, W = inputs(), weights()
    m = factors("aser", X, W)
    level = (statistics(X).mean / m)[OUTLIERS]
    others = [c for c in range(64) if c not in OUTLIERS]
    torch.testing.assert_close(level, statistics(X).mean[others].max().expand(3))
    assert torch.equal(m[others], torch.ones(61))


def test_aser_takes_channels_that_are_large_in_inputs_and_weights():
    activation, weight = torch.tensor([1.0, 9.0, 8.0, 1.0]), torch.tensor([1.0, 0.01, 1.0, 1.0])
    assert aser_factors(activation, weight, 1).tolist() == [1, 1, 1, 1], "it makes no channel larger"
    assert aser_factors(activation, weight.clamp(min=1), 1).tolist() == [1, 9 / 8, 1, 1]


@pytest.mark.parametrize("count", [1, 2, 3, 32])
def test_aser_of_few_channels(count):
    assert bool((aser_factors(torch.ones(3), torch.ones(3), count) == 1).all())
    assert aser_factors(torch.ones(1), torch.ones(1), count).tolist() == [1]


def test_smoothquant_is_its_formula_over_the_geometric_mean():
    a, w = torch.tensor([4.0, 1.0, 0.25, 0.0]), torch.tensor([1.0, 2.0, 0.5, 1.0])
    naive = (a[:3].double() ** 0.7) / (w[:3].double() ** 0.3)
    m = smoothquant_factors(a, w, 0.7)
    torch.testing.assert_close(m[:3].double(), naive / naive.log().mean().exp(), rtol=1e-6, atol=0)
    assert m[3] == 1, "a channel that is always 0 stays"


def test_powers_of_two_are_the_nearest_and_limited():
    assert powers_of_two(torch.tensor([1.0, 1.4, 1.5, 0.3, 1e30])).tolist() == [1, 1, 2, 0.25, 2**14]


def test_sums_do_not_depend_on_how_tokens_are_shared_out():
    X = inputs().float()
    parts = []
    for piece in X.split(100):
        parts.append(ChannelSums(64, X.device))
        parts[-1].add_(piece)
    merged, naive = ChannelSums(X.shape[-1], X.device), X.double().abs()
    for part in parts:
        merged.merge_(part.total, part.maximum, part.num_tokens)
    assert merged.num_tokens == 256
    torch.testing.assert_close(merged.finish().mean.double(), naive.mean(0), rtol=1e-6, atol=0)
    assert torch.equal(merged.finish().maximum.double(), naive.amax(0))


def test_tied_channels_share_a_mean_and_the_largest_maximum():
    seen = ChannelStatistics(torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([1.0, 5.0, 9.0, 7.0]))
    tied = seen.tied(torch.tensor([0, 1, 0, 1]), 3)
    assert tied.mean.tolist() == [2, 4, 0]
    assert tied.maximum.tolist() == [9, 7, 0]


@pytest.mark.parametrize("rule", ["aser", "smoothquant"])
def test_channels_of_one_row_get_one_factor(rule):
    settings = Activations(bits=8, smoothing=rule)
    X, rows = inputs(), torch.arange(64) % 16 + 4
    of_rows = row_factors(settings, statistics(X), column_statistics([weights()]), rows, 24)
    assert of_rows.shape == (24,)
    assert bool((of_rows[:4] == 1).all()), "rows that make no channel stay"
    assert int((of_rows != 1).sum()) >= 2
    assert bool((of_rows.log2() % 1 == 0).all())


def test_columns_of_several_layers_are_taken_together():
    first, second = weights(), random_weights(32, 64).double()
    both = torch.cat([first, second]).abs()
    seen = column_statistics([first, second])
    torch.testing.assert_close(seen.mean.double(), both.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(seen.maximum.double(), both.amax(0), rtol=1e-6, atol=0)
