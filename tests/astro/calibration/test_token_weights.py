"""Token weights: the Hessians that they make, and what they are made of."""

import pytest
import torch

from astro.calibration.drift import DriftAccumulator
from astro.calibration.hessian import HessianAccumulator
from astro.calibration.token_weights import (
    OUTPUT,
    TokenWeights,
    effective_tokens,
    loss_weights,
    norm_weights,
    output_energy,
    typical_energy,
)
from astro.model.operands import Inputs, Operand
from tests.support.devices import here
from tests.support.models import correlated_inputs, naive_hessian

CPU = torch.device("cpu")
on_every_device = pytest.mark.usefixtures("device")


def weighed(X, weights, pieces):
    accumulator = HessianAccumulator(X.shape[1], here())
    for part, w in zip(X.chunk(pieces), weights.chunk(pieces), strict=True):
        accumulator.add_(part, w)
    return accumulator


@on_every_device
def test_weighted_hessian_against_naive_float64():
    X = correlated_inputs(70, 48).float()
    weights = torch.rand(70, generator=torch.Generator().manual_seed(1)) ** 4
    H = weighed(X, weights, 3).finish_("layer")
    expected = naive_hessian(X, weights)
    torch.testing.assert_close(H.double(), expected, rtol=1e-4, atol=float(expected.abs().max()) * 1e-5)


@on_every_device
def test_weighted_shares_merge_to_the_same_bits():
    X, weights = correlated_inputs(60, 16).float(), torch.rand(60)
    merged = HessianAccumulator(16, here())
    for part, w in zip(X.chunk(3), weights.chunk(3), strict=True):
        share = weighed(part, w, 1)
        merged.merge_(share.partial, share.num_tokens, share.totals.tolist())
    whole = weighed(X, weights, 3)
    assert merged.effective_tokens() == whole.effective_tokens()
    assert torch.equal(merged.finish_("x"), whole.finish_("x"))


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_effective_tokens_against_naive_float64(dtype):
    X, weights = correlated_inputs(70, 48).to(dtype), torch.rand(70) ** 3
    energies = weights.double() * X.double().square().sum(-1)
    expected = float(energies.sum() ** 2 / energies.square().sum())
    assert float(weighed(X, weights, 3).effective_tokens()) == pytest.approx(expected, rel=1e-5)
    alike = float(weighed(X, norm_weights(X), 1).effective_tokens())
    assert alike == pytest.approx(70, rel=1e-5), "tokens of equal energy all count"
    silent = HessianAccumulator(48, here())
    silent.add_(torch.zeros(5, 48))
    assert silent.effective_tokens() == 0


@on_every_device
def test_weighted_drift_against_naive_float64():
    X, source = correlated_inputs(40, 12).float(), correlated_inputs(40, 12, seed=1).float()
    weights = torch.rand(40)
    drift = DriftAccumulator(12, here())
    for part in range(2):
        rows = slice(20 * part, 20 * part + 20)
        drift.add_(source[rows], X[rows], weights[rows])
    expected = ((source - X).double().T * weights.double()) @ X.double() / weights.double().sum()
    torch.testing.assert_close(drift.finish_("x", torch.ones(12)).double(), expected, rtol=1e-4, atol=1e-5)


def test_norm_gives_every_token_the_same_energy():
    X = correlated_inputs(30, 16).float() * torch.logspace(-2, 2, 30).unsqueeze(-1)
    X[4] = 0
    weights = norm_weights(X)
    energy = weights * X.square().mean(-1)
    torch.testing.assert_close(energy, (torch.arange(30) != 4).float())
    H = weighed(X, weights, 1).finish_("x")
    assert float(H.trace() * weights.sum()) == pytest.approx(16 * 29, rel=1e-4)


def test_a_token_that_is_nearly_silent_owns_nothing():
    X = correlated_inputs(64, 8).float()
    X[3] *= 1e-21
    weights = norm_weights(X)
    assert bool(torch.isfinite(weights).all())
    assert float(weights[3] / weights.median()) < 1e10
    assert float(weighed(X, weights, 1).finish_("x").diagonal().mean()) > 1e-12


def test_inputs_that_are_all_zero_stay_zero():
    X = torch.zeros(5, 4)
    assert not weighed(X, norm_weights(X), 1).finish_("x").any()


def test_loss_weights_are_the_root_of_the_energy_and_have_the_mean_1():
    energy = torch.tensor([1.0, 4.0, 16.0, 0.0])
    weights = loss_weights(energy)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, 4.0, 0.0]) * 4 / 7)
    assert effective_tokens(weights) == pytest.approx(49 / 21)
    torch.testing.assert_close(loss_weights(energy * 1e-30), weights)


@pytest.mark.parametrize("energy", [[0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_energies_that_say_nothing_give_no_weights(energy):
    assert loss_weights(torch.tensor(energy)) is None


def test_tokens_at_the_output_count_as_measured_or_by_their_norm():
    Y = correlated_inputs(6, 8).float().reshape(2, 3, 8)
    measured = TokenWeights("loss", {("c0000", OUTPUT): torch.arange(6.0), ("c0000", "q"): torch.ones(6)})
    assert torch.equal(measured.of_output("c0000", Y), torch.arange(6.0))
    for unmeasured in (TokenWeights("norm"), TokenWeights("loss", {("c0000", "q"): torch.arange(6.0)})):
        weights = unmeasured.of_output("c0000", Y)
        energy = (weights * Y.flatten(0, 1).square().mean(-1)).tolist()
        assert energy == pytest.approx([1.0] * 6)
        assert torch.equal(weights, unmeasured.of_output("c0000", Y.unflatten(-1, (2, 4)))), "with lanes too"
    assert torch.equal(TokenWeights("none").of_output("c0000", Y), torch.ones(6))


def test_energy_at_the_output_is_the_mean_square_of_the_gradient():
    gradient = correlated_inputs(6, 8).reshape(2, 3, 2, 4)
    expected = [[float((token.double() ** 2).mean()) for token in sequence] for sequence in gradient]
    assert output_energy(gradient).tolist() == pytest.approx([*expected[0], *expected[1]])


def test_groups_that_were_not_measured_are_weighted_by_their_norm():
    X = correlated_inputs(6, 8).float()
    q, expert = Operand(("q",), "q", None, 8), Operand(("e",), "e", 0, 8)
    weights = TokenWeights("loss", {("c0000", "q"): torch.arange(6.0)})
    assert [weights.kind_of(operand) for operand in (q, expert)] == ["loss", "norm"]
    assert torch.equal(weights.of(q, "c0000", Inputs(X)), torch.arange(6.0))
    assert torch.equal(weights.of(expert, "c0000", Inputs(X)), norm_weights(X))
    assert TokenWeights("none").of(q, "c0000", Inputs(X)) is None
    routed = TokenWeights("loss", {("c0000", "experts"): torch.arange(10.0)})
    expert = Operand(("e.3.up",), "experts", 3, 8)
    tokens = torch.tensor([7, 1, 2, 3, 0, 9])
    assert torch.equal(routed.of(expert, "c0000", Inputs(X, tokens)), tokens.float())
    assert torch.equal(routed.of(expert, "c0000", Inputs(X)), norm_weights(X))


def test_typical_energy_of_the_tokens_that_a_layer_sees():
    assert typical_energy([torch.tensor([1.0, 9.0]), torch.tensor([4.0])], 3) == pytest.approx(4.0)
    assert typical_energy([torch.tensor([1.0, 9.0]), torch.tensor([4.0])], 12) == pytest.approx(1.0)
    assert typical_energy([torch.zeros(0)], 3) == 0.0
