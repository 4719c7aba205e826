"""Astro and MagR against the paper's equations and a long float64 solution."""

import pytest
import torch

from astro.config import Regularizer
from astro.errors import ConfigError, NumericalError
from astro.linalg import bf16_matmul
from astro.quantization.regularizer import (
    group_activations,
    largest_eigenvalue,
    mean_group_maximum,
    prepare,
    prox,
    regularize,
)
from tests.support.models import correlated_inputs, random_weights

pytestmark = pytest.mark.usefixtures("device")

G = 8


def layer(rows=6, columns=32, seed=0):
    X = correlated_inputs(200, columns, seed)
    return X, (X.T @ X).float(), random_weights(rows, columns, seed + 1)


def objective(W, W0, X, beta, alpha):
    """Equation 12 with X scaled to a largest squared singular value of 1, in float64, summed over rows."""
    X = X / torch.linalg.matrix_norm(X, 2)
    fit = ((W.double() - W0.double()) @ X.T).square().sum() / 2
    return float(fit + beta * (alpha * W.double().reshape(len(W), -1, G).abs().amax(-1)).sum())


def run(H, W, **changes):
    settings = Regularizer(**{"beta": 1e-3, "beta_unit": "absolute", "iterations": 20, **changes})
    return regularize(W, prepare(H, mean_group_maximum(W, G), settings, G, ["x"]), settings.beta)


def naive_prox(v, tau):
    """v − τ P₁(v/τ), the projection on the L1 ball by bisection, float64."""
    if v.abs().sum() <= tau:
        return torch.zeros_like(v)
    low, high = 0.0, float(v.abs().max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((v.abs() - middle).clamp(min=0).sum()) > tau else (low, middle)
    return v - v.sign() * (v.abs() - low).clamp(min=0)


def test_guidance_is_equation_11():
    X, H, _ = layer()
    norms = torch.stack([torch.linalg.matrix_norm(part) for part in X.split(G, dim=1)])
    torch.testing.assert_close(group_activations(H, G).double(), norms / norms.mean(), rtol=1e-4, atol=1e-6)


def test_guidance_does_not_depend_on_the_scale_of_the_hessian():
    _, H, _ = layer()
    torch.testing.assert_close(group_activations(H * 1e-4, G), group_activations(H, G))


def test_largest_eigenvalue_against_numpy():
    _, H, _ = layer()
    assert float(largest_eigenvalue(H)) == pytest.approx(float(torch.linalg.eigvalsh(H.double())[-1]), rel=1e-4)


@pytest.mark.parametrize("tau", [0.0, 1e-3, 0.3, 2.0, 100.0])
def test_prox_against_bisection_in_float64(tau):
    V = random_weights(5, 32)
    expected = torch.stack([torch.cat([naive_prox(g, tau) for g in row.split(G)]) for row in V.double()])
    torch.testing.assert_close(prox(V, torch.full((4,), tau), G).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group_size", [64, 128, 1024, 4096])
@pytest.mark.parametrize("share", [0.05, 0.8, 5.0])
def test_prox_of_wide_groups_has_converged(group_size, share):
    V = random_weights(4, group_size)
    tau = share * V.abs().max()
    level = prox(V, tau.reshape(1), group_size).abs().amax(-1, keepdim=True).double()
    excess = (V.double().abs() - level).clamp(min=0).sum(-1)
    torch.testing.assert_close(excess, tau.double().expand(4), rtol=1e-5, atol=0)


def test_prox_takes_a_threshold_for_each_group():
    V = random_weights(3, 16)
    result = prox(V, torch.tensor([0.0, 1e3]), G)
    assert torch.equal(result[:, :G], V[:, :G])
    assert not result[:, G:].any()


def test_prox_of_ties_and_zeros():
    V = torch.tensor([[2.0, -2.0, 2.0, -2.0, 0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(prox(V, torch.tensor([2.0]), G), V * 0.75)


def naive_astro(X, W0, beta, iterations):
    """Equations 13 to 15 in float64, written out."""
    X = X / torch.linalg.matrix_norm(X, 2)
    norms = torch.stack([torch.linalg.matrix_norm(part) for part in X.split(G, dim=1)])
    alpha = norms / norms.mean()
    W = W0.double().clone()
    for _ in range(iterations):
        V = W - (W - W0.double()) @ (X.T @ X)
        rows = [[naive_prox(g, float(beta * a)) for g, a in zip(v.split(G), alpha, strict=True)] for v in V]
        W = torch.stack([torch.cat(row) for row in rows])
    return W


def test_pgd_against_the_published_equations_in_float64():
    X, H, W = layer(rows=3)
    ours = run(H, W, solver="pgd", iterations=10)
    torch.testing.assert_close(ours.double(), naive_astro(X, W, 1e-3, 10), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_admm_is_below_the_published_solver_and_near_the_minimum(seed):
    X, H, W = layer(seed=seed)
    alpha = group_activations(H, G).double()
    values = {
        name: objective(run(H, W, solver=name, iterations=steps), W, X, 1e-3, alpha)
        for name, steps in (("admm", 20), ("pgd", 200))
    }
    least = objective(run(H, W, solver="pgd", iterations=8000), W, X, 1e-3, alpha)
    start = objective(W, W, X, 1e-3, alpha)
    assert values["admm"] < values["pgd"]
    assert values["admm"] - least < 0.12 * (start - least)


@pytest.mark.parametrize("beta", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("seed", range(3))
def test_factors_in_bfloat16_cost_next_to_nothing_of_what_is_gained(monkeypatch, beta, seed):
    X, H, W = layer(rows=16, columns=128, seed=seed)
    alpha, values = group_activations(H, G).double(), []
    for is_faster in (False, True):
        monkeypatch.setattr(bf16_matmul, "_is_faster", lambda device, is_faster=is_faster: is_faster)
        values.append(objective(run(H, W, beta=beta), W, X, beta, alpha))
    start = objective(W, W, X, beta, alpha)
    assert values[1] - values[0] < 0.01 * (start - values[0])


def test_guidance_moves_the_shrinking_to_groups_with_large_activations():
    _, H, W = layer(rows=64)
    results = (W, run(H, W, name="magr", iterations=50), run(H, W, name="astro", iterations=50))
    before, magr, astro = (V.reshape(64, -1, G).abs().amax(-1).mean(0) for V in results)
    assert bool((astro < before).all())
    assert torch.equal(astro < magr, group_activations(H, G) > 1)


def test_magr_is_astro_with_equal_guidance():
    X, H, W = layer()
    ones = torch.ones(4, dtype=torch.float64)
    magr, astro = run(H, W, name="magr", iterations=60), run(H, W, name="astro", iterations=60)
    assert objective(magr, W, X, 1e-3, ones) < objective(astro, W, X, 1e-3, ones)
    H_flat = torch.eye(32)
    torch.testing.assert_close(run(H_flat, W, name="magr"), run(H_flat, W, name="astro"))


def test_relative_beta_follows_the_size_of_the_weights():
    _, H, W = layer()
    small = run(H, W, beta=1e-2, beta_unit="relative")
    large = run(H, W * 128, beta=1e-2, beta_unit="relative")  # which bfloat16 rounds alike
    torch.testing.assert_close(large, small * 128, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["admm", "pgd"])
def test_beta_zero_changes_nothing(solver):
    _, H, W = layer()
    torch.testing.assert_close(run(H, W, beta=0.0, solver=solver), W)


def test_solvers_bring_their_own_number_of_iterations():
    assert [Regularizer(solver=solver).steps for solver in ("admm", "pgd")] == [6, 200]


def test_hessian_of_zeros_is_an_error():
    with pytest.raises(NumericalError, match="x: every calibration input of this layer is zero"):
        run(torch.zeros(8, 8), random_weights(2, 8))


def test_matrix_that_has_no_inverse_is_an_error(monkeypatch):
    monkeypatch.setattr("astro.quantization.regularizer.largest_eigenvalue", lambda H: torch.ones(1))
    H = torch.zeros(1, 8, 8)
    H[0, 3, 3] = -1e-3  # and ρ make a pivot of exactly 0
    with pytest.raises(NumericalError, match=r"x: H \+ 0\.001 λ_max is not positive definite; raise regularizer\.rho"):
        run(H, random_weights(2, 8))


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="beta: expected auto or a number >= 0, got -1"):
        Regularizer(beta=-1)
    with pytest.raises(ConfigError, match="beta_unit: beta: auto is relative"):
        Regularizer(beta_unit="absolute")
    with pytest.raises(ConfigError, match="rho: expected 1e-4 to 1, got 1e-05"):
        Regularizer(rho=1e-5)
    with pytest.raises(ConfigError, match="iterations: expected 1 to 10000, got 0"):
        Regularizer(iterations=0)
