"""A group's shared decisions: β by measurement, compensation of earlier errors, widths that are only measured."""

import pytest
import torch

from astro.calibration.drift import DriftAccumulator
from astro.config import LayerScheme, Quantization, Regularizer, SolverSettings
from astro.errors import NumericalError
from astro.linalg import tiling
from astro.linalg.symmetric import layer_error
from astro.quantization import beta_search
from astro.quantization.compensation import compensate, reproducible_share
from astro.quantization.prepared_groups import prepare_input_groups
from astro.quantization.recipe import InputMoments, Recipe
from astro.quantization.regularizer import regularize
from astro.quantization.row_solver import measure_width, quantize_rows, solve_rows
from astro.quantization.sampled_rows import sample_rows
from tests.support.devices import here
from tests.support.models import correlated_inputs, random_weights

pytestmark = pytest.mark.usefixtures("device")

NONE = Regularizer(name="none")


def prepared(W, H, regularization=NONE, drift=None, **changes):
    settings = Quantization(**{"group_size": 16, "bits": 3, **changes})
    inputs = InputMoments(H[None], drift=drift[None] if drift is not None else None)
    recipe = Recipe(settings, regularization, torch.float16)
    group = prepare_input_groups(["a"], W[None], inputs, settings.scheme("a", W.shape[-1]), recipe)
    return beta_search.search(group, W[None]) if regularization.is_searched else group


def hessian(seed=0, columns=64):
    X = correlated_inputs(300, columns, seed).float()
    return X.T @ X / len(X)


def error(group, W):
    return float(solve_rows(group, W[None]).figures.error.sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scale_search", ["minmax", "hessian"])
def test_chosen_beta_never_loses_to_plain_gptq_by_more_than_noise(seed, bits, scale_search):
    W, H = random_weights(128, 64, seed + 1), hessian(seed)
    plain, chosen = (prepared(W, H, r, bits=bits, scale_search=scale_search) for r in (NONE, Regularizer()))
    assert error(chosen, W) < 1.01 * error(plain, W)


@pytest.mark.parametrize("seed", range(3))
def test_chosen_beta_wins_where_the_range_is_not_searched(seed):
    W, H = random_weights(128, 64, seed + 1), hessian(seed)
    chosen = prepared(W, H, Regularizer(), scale_search="minmax", refine_passes=0)
    assert chosen.beta > 0
    assert chosen.beta_gain > 0.01
    assert error(chosen, W) < error(prepared(W, H, scale_search="minmax", refine_passes=0), W)


def test_beta_that_gains_nothing_is_zero():
    H = torch.eye(64)  # every column alone: nothing can make up for a shrunken weight
    group = prepared(torch.ones(128, 64), H, Regularizer(), bits=8)
    assert (float(group.beta), float(group.beta_gain), group.problem) == (0.0, 0.0, None)


def test_tiles_of_the_sample_do_not_change_the_choice(monkeypatch):
    W, H = random_weights(128, 64), hessian()
    whole = prepared(W, H, Regularizer(), scale_search="minmax", refine_passes=0)
    monkeypatch.setattr(tiling, "row_tile", lambda *_: 34)  # less than seven of the sixteen rows under five candidates
    assert len(beta_search.sample_tiles(128, 64, 1 << 20)) == 3
    cut = prepared(W, H, Regularizer(), scale_search="minmax", refine_passes=0)
    assert cut.beta == whole.beta
    torch.testing.assert_close(cut.beta_gain, whole.beta_gain, rtol=1e-4, atol=0)


def test_given_beta_is_taken_as_it_is():
    group = prepared(random_weights(32, 64), hessian(), Regularizer(beta=2e-4))
    assert (float(group.beta), float(group.beta_gain)) == (2e-4, 0.0)


@pytest.mark.parametrize("search", ["mse", "minmax"])
def test_search_that_looks_at_the_hessian_beats_the_others(search):
    gains = []
    for seed in range(6):
        W, H = random_weights(64, 64, seed + 1), hessian(seed)
        ours, other = (error(prepared(W, H, scale_search=s, refine_passes=0), W) for s in ("hessian", search))
        gains.append(ours / other)
    assert sum(gains) / len(gains) < 0.97


def drifted(seed=0, size=0.3):
    """Inputs in the source model, the same behind quantized layers, and the drift between them."""
    X_source = correlated_inputs(400, 64, seed)
    noise = correlated_inputs(400, 64, seed + 50)
    X = X_source + size * noise * X_source.std() / noise.std()
    drift = DriftAccumulator(64, here())
    drift.add_(X_source.float(), X.float())
    return X_source, X, drift.finish_("a", torch.ones(64))


def test_drift_is_the_mean_of_its_definition():
    X_source, X, drift = drifted()
    torch.testing.assert_close(drift.double(), (X_source - X).T @ X / len(X), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_compensated_weights_against_least_squares_in_float64(share):
    X_source, X, drift = drifted()
    W = random_weights(8, 64)
    H = (X.T @ X / len(X)).float()
    group = prepared(W, H, drift=drift, compensation=share, damping=1e-6)
    wanted = (X + share * (X_source - X)) @ W.double().T
    expected = torch.linalg.lstsq(X, wanted).solution.T
    torch.testing.assert_close(compensate(group, W[None])[0].double(), expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_compensation_brings_outputs_nearer_to_the_source(seed):
    X_source, X, drift = drifted(seed)
    W, H = random_weights(32, 64, seed + 1), (X.T @ X / len(X)).float()
    wanted = X_source @ W.double().T

    def distance(**changes):
        solved = solve_rows(prepared(W, H, drift=drift, bits=8, **changes), W[None])
        return float((X @ solved.grid.dequantize(solved.Q)[0].double().T - wanted).square().sum())

    assert distance(compensation=0.5) < 0.9 * distance(compensation=0.0)


def test_figures_are_those_of_the_compensated_weights():
    _, X, drift = drifted()
    W, H = random_weights(8, 64), (X.T @ X / len(X)).float()
    group = prepared(W, H, drift=drift, compensation=0.5)
    solved = solve_rows(group, W[None])
    expected = layer_error(compensate(group, W[None]), solved.grid.dequantize(solved.Q), H[None])
    torch.testing.assert_close(solved.figures.error, expected, rtol=1e-3, atol=1e-7)


def test_measured_widths_fall_and_leave_the_group_alone():
    W, H = random_weights(64, 64), hessian()
    group = prepared(W, H, Regularizer(beta=1e-4))
    before = solve_rows(group, W[None])
    errors = [measure_width(group, W[None], bits)[0] for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(solve_rows(group, W[None]).Q, before.Q)
    assert errors[1] == pytest.approx(
        float((f := solve_rows(prepared(W[::4], H), W[None, ::4]).figures).error.sum() / f.energy.sum()), rel=0.3
    )


@pytest.mark.parametrize("solver", ["admm", "pgd"])
def test_candidates_tried_together_are_those_tried_alone(solver):
    """Three groups, each with a drift: a tile of the sample, against one candidate of one group after the other."""
    scheme = LayerScheme(group_size=16, bits=3)
    recipe = Recipe(SolverSettings(), Regularizer(solver=solver, iterations=6), torch.float16)
    W = torch.stack([random_weights(128, 64, seed + 1) for seed in range(3)])
    seen = [drifted(seed) for seed in range(3)]
    H = torch.stack([(X.T @ X / len(X)).float() for _, X, _ in seen])
    drift = torch.stack([drift for _, _, drift in seen])
    names = ["a", "b", "c"]
    together = prepare_input_groups(names, W, InputMoments(H, drift=drift), scheme, recipe)
    errors = beta_search.try_betas(together, W, slice(3, 9))
    assert errors.shape == (3, 5, 6)
    for k_group, name in enumerate(names):
        i = slice(k_group, k_group + 1)
        alone = prepare_input_groups([name], W[i], InputMoments(H[i], drift=drift[i]), scheme, recipe)
        rows = compensate(alone, sample_rows(W[i])[:, 3:9])
        for k, strength in enumerate((0.0, 3e-5, 1e-4, 3e-4, 1e-3)):
            Q, grid = quantize_rows(alone, regularize(rows, alone.problem, strength))
            expected = layer_error(rows, grid.dequantize(Q), H[i])[0]
            torch.testing.assert_close(errors[k_group, k], expected, rtol=1e-2, atol=0)


def test_drift_that_is_not_finite_is_an_error():
    drift = DriftAccumulator(4, here())
    drift.add_(torch.full((2, 4), float("inf")), torch.ones(2, 4))
    with pytest.raises(NumericalError, match="a: its inputs in the source model hold NaN or Inf"):
        drift.finish_("a", torch.ones(4))


@pytest.mark.parametrize(("noise", "low", "high"), [(0.0, 0.999, 1.0), (20.0, 0.2, 0.8), (2000.0, 0.0, 0.05)])
def test_share_to_make_up_for_against_naive_float64(noise, low, high):
    """Two halves of the text with one common drift, and noise of their own."""
    C, W = 48, random_weights(64, 48)
    X = correlated_inputs(4000, C).float()
    H = X.T @ X / len(X)
    generator = torch.Generator().manual_seed(3)
    common = 0.1 * torch.randn(C, C, generator=generator) / C**0.5
    halves = [H @ common.T + noise * 0.01 * torch.randn(C, C, generator=generator) for _ in range(2)]
    drift, spread = (halves[0] + halves[1]) / 2, (halves[0] - halves[1]) / 2
    recipe = Recipe(SolverSettings(compensation="auto"), Regularizer(name="none"), torch.float32)
    inputs = InputMoments(H[None], drift=drift[None])
    groups = prepare_input_groups(["a"], W[None], inputs, LayerScheme(group_size=16), recipe)
    (share,) = reproducible_share(groups, W[None], spread[None]).tolist()
    damped = H.double() + float(groups.factor.damping) * H.double().diagonal().mean() * torch.eye(
        C, dtype=torch.float64
    )
    rows = sample_rows(W[None])[0].double()
    first, second = (rows @ half.double() @ damped.inverse() for half in halves)
    inner = lambda A, B: float(((A @ H.double()) * B).sum())  # noqa: E731
    expected = inner(first, second) / (inner(first, first) + inner(second, second)) * 2
    assert share == pytest.approx(max(expected, 0.0), abs=2e-3)
    assert low <= share <= high
