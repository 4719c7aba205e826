"""Refinement: no pass may raise the layer error; a naive float64 version agrees."""

import dataclasses

import pytest
import torch

from astro.config import LayerScheme, SolverSettings
from astro.linalg import bf16_matmul
from astro.linalg.cholesky import factorize
from astro.quantization import refine as refine_module
from astro.quantization.gptq import activation_order, solve
from astro.quantization.grid import QuantizedLinear, fit_grid
from astro.quantization.refine import refine
from tests.support.devices import here
from tests.support.models import correlated_inputs, random_weights

pytestmark = pytest.mark.usefixtures("device")

DAMPING = 0.01


@pytest.fixture(autouse=True)
def float32_products(monkeypatch):
    """What is tested does not depend on the machine: rounded factors where a test asks for them."""
    monkeypatch.setattr(bf16_matmul, "_is_faster", lambda device: False)


def ridge(H):
    return DAMPING * H.diagonal().mean()


def run(W, Q, grid, H, passes, tolerance=0.0, dtype=torch.float16):
    refined, _ = refine(W, QuantizedLinear(Q, grid), H, ridge(H), settings(passes, tolerance), dtype)
    return refined.Q, refined.grid


def settings(passes, tolerance=0.0):
    return SolverSettings(refine_passes=passes, refine_tolerance=tolerance)


def problem(rows=12, columns=64, seed=0, **changes):
    X = correlated_inputs(3 * columns, columns, seed)
    H = (X.T @ X / len(X)).float()
    W = random_weights(rows, columns, seed + 1)
    scheme = LayerScheme(**{"group_size": 16, "bits": 3, **changes})
    factor = factorize(H, activation_order(H), DAMPING, 1.0, ["x"])
    grid = fit_grid(W, scheme, SolverSettings(), torch.float16, factor.cost)
    return W, H, solve(W, factor, grid), grid


def error(W, Q, grid, H):
    """The damped layer error of each row, in float64."""
    E = W.double() - (Q.double() - grid.zero.double().repeat_interleave(grid.group_size, 1)) * (
        grid.scale.double().repeat_interleave(grid.group_size, 1)
    )
    return ((E @ H.double()) * E).sum(1) + ridge(H).double() * E.square().sum(1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "columns"), [(16, 64), (96, 480), (-1, 64), (-1, 300), (160, 320)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_pass_raises_the_error_of_any_row(seed, bits, group_size, columns, symmetric):
    W, H, Q, grid = problem(columns=columns, seed=seed, bits=bits, group_size=group_size, symmetric=symmetric)
    before = error(W, Q, grid, H)
    for _ in range(3):
        Q, grid = run(W, Q, grid, H, 1)
        after = error(W, Q, grid, H)
        assert bool((after <= before).all())
        before = after


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("group_size", "columns"), [(16, 64), (96, 480), (-1, 300)])
def test_products_of_rounded_factors_keep_the_promise(monkeypatch, seed, bits, group_size, columns):
    W, H, Q, grid = problem(columns=columns, seed=seed, bits=bits, group_size=group_size)
    plain = run(W, Q, grid, H, 3)
    monkeypatch.setattr(bf16_matmul, "_is_faster", lambda device: True)
    before = error(W, Q, grid, H)
    for _ in range(3):
        Q, grid = run(W, Q, grid, H, 1)
        after = error(W, Q, grid, H)
        assert bool((after <= before).all())
        before = after
    assert float(before.sum()) == pytest.approx(float(error(W, *plain, H).sum()), rel=2e-2)


def test_rows_that_would_end_worse_stay_what_they_were(monkeypatch):
    W, H, Q, grid = problem()
    # Slopes that point the wrong way for every second row.
    signs = torch.tensor([1.0, -1.0]).repeat(len(W) // 2)
    real = refine_module.product
    monkeypatch.setattr(refine_module, "product", lambda A, B: real(A, B) * signs)
    refined = run(W, Q, grid, H, 2)
    before, after = error(W, Q, grid, H), error(W, *refined, H)
    assert bool((after[::2] < before[::2]).all())
    assert torch.equal(refined[0][1::2], Q[1::2])
    assert torch.equal(refined[1].scale[1::2], grid.scale[1::2])


@pytest.mark.parametrize(("group_size", "columns"), [(16, 64), (96, 480), (-1, 300)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gain_of_a_pass_is_what_the_error_fell_by(monkeypatch, group_size, columns, symmetric):
    """Nothing is held back then: in float32 a pass alone keeps the promise for every row."""
    W, H, Q, grid = problem(rows=40, columns=columns, group_size=group_size, symmetric=symmetric)
    assert symmetric == bool((grid.scale < 0).any())
    seen, real = [], refine_module._State.sweep

    def sweep(state):
        before = state.errors()[1]
        seen.append((before, *real(state), state.errors()[1]))
        return seen[-1][1:3]

    monkeypatch.setattr(refine_module._State, "sweep", sweep)
    run(W, Q, grid, H, 3)
    for before, gain, met, after in seen:
        assert bool((after <= before * (1 + 1e-5)).all())
        assert float(gain) == pytest.approx(float((before - after).sum()), rel=2e-3)
        assert float(after.sum()) * 0.99 < float(met) < float(before.sum()) * 1.01


def test_error_is_that_of_the_result():
    W, H, Q, grid = problem()
    refined, errors = refine(W, QuantizedLinear(Q, grid), H, ridge(H), settings(2), torch.float16)
    E = (W - refined.dequantize()).double()
    torch.testing.assert_close(errors, ((E @ H.double()) * E).sum(1).float(), rtol=1e-4, atol=0)


def test_layers_side_by_side_do_not_meet_when_factors_are_rounded(monkeypatch):
    monkeypatch.setattr(bf16_matmul, "_is_faster", lambda device: True)
    problems = [problem(columns=480, seed=seed, group_size=96) for seed in range(2)]
    W, H, Q = (torch.stack([own[i] for own in problems]) for i in range(3))
    scale, zero = (torch.stack([getattr(own[3], name) for own in problems]) for name in ("scale", "zero"))
    grid = dataclasses.replace(problems[0][3], scale=scale, zero=zero)
    damping = torch.stack([ridge(own[1]) for own in problems])
    together, _ = refine(W, QuantizedLinear(Q, grid), H, damping, settings(2), torch.float16)
    for i, (W, H, Q, grid) in enumerate(problems):
        alone = run(W, Q, grid, H, 2)
        assert int(together.Q[i].ne(alone[0]).sum()) <= 0.002 * Q.numel()
        torch.testing.assert_close(together.grid.scale[i], alone[1].scale, rtol=1e-2, atol=0)


def naive(W, Q, grid, H, scale_dtype):
    """One pass in float64, one row and one coordinate after the other."""
    W, g = W.double(), grid.group_size
    H = H.double() + ridge(H).double() * torch.eye(len(H))
    V = (Q.double().reshape(len(Q), -1, g) - grid.zero.double().unsqueeze(-1)).flatten(1)
    scale = grid.scale.double().clone()
    for r in range(len(W)):
        for k in range(scale.shape[1]):
            B = slice(k * g, (k + 1) * g)
            v = V[r, B]
            slope, curvature = ((W[r] - V[r] * scale[r].repeat_interleave(g)) @ H[:, B]) @ v, v @ H[B, B] @ v
            new = (scale[r, k] + slope / curvature).to(scale_dtype).double()
            step = new - scale[r, k]
            if step * (2 * slope - step * curvature) > 0 and new * scale[r, k] > 0:
                scale[r, k] = new
            low, high = grid.q_min - float(grid.zero[r, k]), grid.q_max - float(grid.zero[r, k])
            for i in range(B.start, B.stop):
                e = W[r] - V[r] * scale[r].repeat_interleave(g)
                best = V[r, i] + (e @ H[:, i]) / (H[i, i] * scale[r, k])
                V[r, i] = best.round().clamp(low, high)
    Q = (V.reshape(len(Q), -1, g) + grid.zero.double().unsqueeze(-1)).flatten(1).to(torch.int8)
    return Q, dataclasses.replace(grid, scale=scale.float())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "columns"), [(16, 64), (48, 288), (144, 144)])
def test_against_one_coordinate_after_the_other_in_float64(symmetric, group_size, columns):
    W, H, Q, grid = problem(rows=4, columns=columns, group_size=group_size, symmetric=symmetric)
    ours, theirs = run(W, Q, grid, H, 1), naive(W, Q, grid, H, torch.float16)
    assert int(ours[0].ne(theirs[0]).sum()) <= 0.02 * Q.numel()  # a tie may fall the other way in float32
    assert float(error(W, *ours, H).sum()) == pytest.approx(float(error(W, *theirs, H).sum()), rel=5e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_two_passes_save_some_percent(bits):
    W, H, Q, grid = problem(rows=64, bits=bits)
    refined = run(W, Q, grid, H, 2)
    assert float(error(W, *refined, H).sum()) < 0.96 * float(error(W, Q, grid, H).sum())


def test_what_is_read_group_by_group_lies_row_by_row(monkeypatch):
    W, H, Q, grid = problem(symmetric=False)
    states, real = [], refine_module._State.sweep
    monkeypatch.setattr(refine_module._State, "sweep", lambda self: states.append(self) or real(self))
    run(W, Q, grid, H, 1)
    work = (states[0].V, states[0].E, states[0].scale, states[0].low, states[0].high)
    assert all(X.is_contiguous() for X in work)


def test_rows_do_not_meet():
    W, H, Q, grid = problem()
    whole = run(W, Q, grid, H, 2)
    part = dataclasses.replace(grid, scale=grid.scale[:5], zero=grid.zero[:5])
    alone = run(W[:5], Q[:5], part, H, 2)
    # On a GPU products of other sizes round differently.
    ties = 0 if here().type == "cpu" else 0.01
    assert float(alone[0].ne(whole[0][:5]).float().mean()) <= ties
    assert float(alone[1].scale.ne(whole[1].scale[:5]).float().mean()) <= ties


def test_pass_that_gains_too_little_is_the_last():
    W, H, Q, grid = problem()
    once = run(W, Q, grid, H, 1)
    stopped = run(W, Q, grid, H, 9, 0.999)
    assert torch.equal(stopped[0], once[0])
    assert not torch.equal(run(W, Q, grid, H, 9)[0], once[0])


def test_new_scales_are_exact_in_the_stored_dtype_and_positive():
    W, H, Q, grid = problem()
    scale = run(W, Q, grid, H, 3, dtype=torch.bfloat16)[1].scale
    kept = scale == grid.scale
    assert torch.equal(scale[~kept], scale[~kept].bfloat16().float())
    assert bool((~kept).any())
    assert bool((scale * grid.scale > 0).all())


@pytest.mark.parametrize("size", [1e-2, 1e-4, 0.0])
def test_columns_whose_inputs_are_nearly_silent_keep_their_weights(size):
    X = correlated_inputs(300, 64)
    X[:, 5] *= size
    H, W = (X.T @ X / 300).float(), random_weights(32, 64)
    factor = factorize(H, activation_order(H), DAMPING, 1.0, ["x"])
    grid = fit_grid(W, LayerScheme(group_size=16), SolverSettings(), torch.float16, factor.cost)
    Q, refined = run(W, (before := solve(W, factor, grid)), grid, H, 4)
    errors = [(g.dequantize(q) - W)[:, 5].norm() for q, g in ((before, grid), (Q, refined))]
    assert float(errors[1]) < 1.5 * float(errors[0])


def test_zero_rows_stay_zero():
    W, H, Q, grid = problem()
    W[2], Q[2] = 0, 0
    assert not run(W, Q, grid, H, 2)[0][2].any()


def test_scale_never_falls_to_zero():
    W, H, Q, grid = problem()
    smallest = torch.full_like(grid.scale, torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps)
    tiny = dataclasses.replace(grid, scale=smallest)
    _, refined = run(W * 1e-9, torch.ones_like(Q), tiny, H, 2)
    assert bool((refined.scale > 0).all())


def test_zero_passes_change_nothing():
    W, H, Q, grid = problem()
    refined, same = run(W, Q, grid, H, 0)
    assert torch.equal(refined, Q)
    assert torch.equal(same.scale, grid.scale)
