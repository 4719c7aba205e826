"""What is summed of inputs that are rounded, against the definitions in float64."""

import pytest
import torch

from astro.activation_config import ActivationScheme
from astro.calibration.drift import DriftAccumulator
from astro.calibration.input_sums import InputSums, RoundingMoments, SumKind, side_by_side
from astro.calibration.token_weights import norm_weights
from astro.model.activation_rounding import round_activations
from tests.support.devices import here
from tests.support.models import correlated_inputs, naive_hessian, random_weights, shrunk

pytestmark = pytest.mark.usefixtures("device")

INT4 = ActivationScheme(4, "int")
KIND = SumKind(INT4, has_rounding_drift=True)


def chunks():
    """Three chunks of different sizes, and weights of their tokens."""
    X = correlated_inputs(300, 24).float()
    weights = torch.linspace(0.2, 2.0, 300)
    return list(zip(X.split([40, 200, 60]), weights.split([40, 200, 60]), strict=True))


def summed(kind, keep_inputs=False, part=slice(None)):
    sums = InputSums(24, here(), kind, "norm", keep_inputs)
    for X, weights in chunks()[part]:
        sums.add_(X.to(here()), weights.to(here()))
    return sums


def whole():
    X, weights = (torch.cat(parts) for parts in zip(*chunks(), strict=True))
    return X, round_activations(X, INT4), weights


def test_against_definitions_in_float64():
    X, rounded, weights = whole()
    H, drift, rounding = summed(KIND).finish_("q")
    assert drift is None
    torch.testing.assert_close(H.cpu().double(), naive_hessian(rounded, weights), rtol=1e-4, atol=1e-4)
    D = (X.double() - rounded.double()).T * weights.double() @ rounded.double() / weights.double().sum()
    energies = weights.double() * rounded.double().square().sum(-1)
    tokens = energies.sum() ** 2 / energies.square().sum()
    expected = shrunk(D, H.diagonal().cpu().double(), float(tokens))
    torch.testing.assert_close(rounding.drift.cpu().double(), expected, rtol=1e-3, atol=1e-4)


def test_kept_inputs_and_absorbed_sums_come_to_the_same():
    expected = summed(KIND).finish_("q")
    kept, absorbing = summed(KIND, keep_inputs=True), summed(KIND, part=slice(1))
    absorbing.absorb_(summed(KIND, keep_inputs=True, part=slice(1, None)))
    for sums in (kept, absorbing):
        H, _, rounding = sums.finish_("q")
        torch.testing.assert_close(H, expected[0])
        torch.testing.assert_close(rounding.drift, expected[2].drift)
        torch.testing.assert_close(rounding.sample, expected[2].sample)


def test_kept_inputs_have_the_same_bits():
    _, _, kept = summed(KIND, keep_inputs=True).finish_("q")
    _, _, added = summed(KIND).finish_("q")
    assert torch.equal(kept.drift, added.drift)


def with_massive_tokens(kind):
    """Sequences of 256 tokens, the first of each with some massive inputs, and weights of one of the three kinds."""
    X = correlated_inputs(8192, 24).float()
    X[::256, 3] *= 300
    weights = torch.rand(8192, generator=torch.Generator().manual_seed(0)).add_(0.5)
    weights[::256] /= 2000
    return X, {"loss": weights / weights.mean(), "norm": norm_weights(X), "none": torch.ones(8192)}[kind]


@pytest.mark.parametrize("weight_error", [0.0, 0.003, 0.1])
@pytest.mark.parametrize("kind", ["loss", "norm", "none"])
def test_sample_says_what_a_layer_loses(kind, weight_error):
    """It does where rounding does all the harm, where weights do it, and where both do."""
    X, weights = with_massive_tokens(kind)
    sums, W = InputSums(24, here(), SumKind(ActivationScheme(8, "int")), kind), random_weights(16, 24)
    for x, w in zip(X.to(here()).split(512), weights.to(here()).split(512), strict=True):
        sums.add_(x, None if kind == "none" else w)
    _, _, rounding = sums.finish_("q")
    assert len(rounding.sample) == 256
    off = weight_error * W.norm() * random_weights(16, 24) / random_weights(16, 24).norm()
    rounded = round_activations(X, ActivationScheme(8, "int"))
    missed = (X - rounded) @ W.T + rounded @ off.T
    counts, mean = (weights.square(), weights.mean().square()) if kind == "loss" else (weights, weights.mean())
    kept, lost = rounding.sample.cpu().chunk(2, dim=-1)
    found = (lost @ W.T + kept @ off.T).square().sum()
    torch.testing.assert_close(found, (missed.square().sum(-1) * counts).mean() / mean, rtol=0.2, atol=0)


def test_sample_of_few_tokens_of_none_and_of_such_as_lie_on_the_grid():
    for num_tokens in (0, 3):
        sums, X = InputSums(24, here(), KIND, "none"), correlated_inputs(50, 24).float().to(here())
        sums.add_(X[:20])
        sums.add_(X[20 : 20 + num_tokens])
        assert len(sums.sample.rows) == 16 + num_tokens
    sums, grid = InputSums(24, here(), KIND, "none"), torch.randint(-7, 8, (200, 24), device=here()).float()
    grid[:, 0] = 7  # each token lies on its grid, so that rounding takes nothing
    sums.add_(grid)
    torch.testing.assert_close(
        sums.finish_("q")[2].sample.square().sum(), grid.square().sum(-1).mean(), rtol=0.1, atol=0
    )
    silent = InputSums(24, here(), KIND, "none")
    silent.add_(torch.zeros(20, 24, device=here()))
    assert not silent.finish_("q")[2].sample.any()


def test_long_sample_is_thinned_and_means_the_same():
    X = correlated_inputs(6400, 24).float().to(here())
    sums = InputSums(24, here(), KIND, "none")
    for part in X.split(16):
        sums.add_(part)
    _, _, rounding = sums.finish_("q")
    assert 2048 <= len(rounding.sample) <= 4096
    lost = (X - round_activations(X, INT4)).square().sum(-1).mean()
    torch.testing.assert_close(rounding.sample[:, 24:].square().sum(), lost, rtol=0.05, atol=0)


def test_nothing_more_is_summed_where_inputs_stay_as_they_are():
    H, drift, rounding = summed(SumKind(has_rounding_drift=True)).finish_("q")
    X, _, weights = whole()
    assert drift is None
    assert rounding is None
    torch.testing.assert_close(H.cpu().double(), naive_hessian(X, weights), rtol=1e-4, atol=1e-4)


def test_inputs_that_were_larger_in_the_source_want_weights_that_are_larger_by_as_much():
    """d = 0.1 x makes the drift 0.1 H, and W + W D H⁻¹ = 1.1 W, only if both are shrunk alike; halves are as well."""
    sums, half = InputSums(24, here(), SumKind(has_drift=True), "norm"), DriftAccumulator(24, here())
    for number, (X, weights) in enumerate(chunks()):
        X, weights = X.to(here()), weights.to(here())
        sums.add_(X, weights)
        for drift in (sums.drift, half)[: 2 if number < 2 else 1]:
            drift.add_(1.1 * X, X, weights)
    total, of_half = float(sums.drift.total_weight), float(half.total_weight)
    D, rest = half.partial / of_half, (sums.drift.partial - half.partial) / (total - of_half)
    apart = (D - rest).double() * (of_half * (total - of_half)) ** 0.5 / total
    tokens = float(sums.hessian.effective_tokens())
    energies = sums.hessian.partial.diagonal().double()
    torch.testing.assert_close(sums.spread_(half).double(), shrunk(apart, energies, tokens), rtol=1e-3, atol=1e-5)
    H, drift, _ = sums.finish_("q")
    torch.testing.assert_close(drift, 0.1 * H, rtol=1e-4, atol=1e-5)


def test_moments_of_different_samples_lie_side_by_side():
    first = RoundingMoments(torch.ones(3, 8), torch.eye(4))
    second = RoundingMoments(torch.ones(5, 8), torch.eye(4))
    together = side_by_side([first, None, second], 4)
    assert together.sample.shape == (3, 5, 8)
    assert together.sample.sum((1, 2)).tolist() == [24.0, 0.0, 40.0]
    assert together.drift.sum((1, 2)).tolist() == [4.0, 0.0, 4.0]
    assert side_by_side([None], 4) is None


def test_corrections_get_the_drift_against_inputs_as_they_are():
    kind = SumKind(INT4, has_correction_drift=True)
    sums, X = InputSums(24, here(), kind, "norm"), correlated_inputs(100, 24).float().to(here())
    weights = torch.rand(100, device=here())
    for x, w in zip(X.split(50), weights.split(50), strict=True):
        sums.add_(x, w)
    lost = (X - round_activations(X, INT4)).T * weights
    torch.testing.assert_close(sums.correction_drift.partial, lost @ X, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sums.rounding_drift.partial, lost @ round_activations(X, INT4), rtol=1e-3, atol=1e-4)
    both = InputSums(24, here(), kind, "norm")
    both.absorb_(sums)
    assert torch.equal(both.correction_drift.partial, sums.correction_drift.partial)
