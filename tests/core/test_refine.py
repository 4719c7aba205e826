"""Refinement: no pass may raise the layer error; a naive float64 version agrees."""

import dataclasses

import pytest
import torch

from astro.config import Quantization
from astro.gptq import activation_order, solve
from astro.grid import fit_grid
from astro.hessian import factorize
from astro.refine import refine
from tests.conftest import correlated_inputs, random_weights


def problem(rows=12, columns=64, seed=0, **changes):
    X = correlated_inputs(3 * columns, columns, seed)
    H = (X.T @ X / len(X)).float()
    W = random_weights(rows, columns, seed + 1)
    settings = Quantization(**{"group_size": 16, "bits": 3, **changes})
    factor = factorize(H, activation_order(H), 0.01, 1.0, "x")
    grid = fit_grid(W, settings, torch.float16, factor.cost)
    return W, H, solve(W, factor, grid), grid


def error(W, Q, grid, H):
    """Of each row, in float64."""
    E = W.double() - (Q.double() - grid.zero.double().repeat_interleave(grid.group_size, 1)) * (
        grid.scale.double().repeat_interleave(grid.group_size, 1)
    )
    return ((E @ H.double()) * E).sum(1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "columns"), [(16, 64), (-1, 64), (-1, 300), (160, 320)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_pass_raises_the_error_of_any_row(seed, bits, group_size, columns, symmetric):
    W, H, Q, grid = problem(columns=columns, seed=seed, bits=bits, group_size=group_size, symmetric=symmetric)
    before = error(W, Q, grid, H)
    for _ in range(3):
        Q, grid = refine(W, Q, grid, H, 1, 0.0, torch.float16)
        after = error(W, Q, grid, H)
        assert bool((after <= before).all())
        before = after


def naive(W, Q, grid, H, scale_dtype):
    """One pass in float64, one row and one coordinate after the other."""
    W, H, g = W.double(), H.double(), grid.group_size
    V = (Q.double().reshape(len(Q), -1, g) - grid.zero.double().unsqueeze(-1)).flatten(1)
    scale = grid.scale.double().clone()
    for r in range(len(W)):
        for k in range(scale.shape[1]):
            B = slice(k * g, (k + 1) * g)
            v = V[r, B]
            slope, curvature = ((W[r] - V[r] * scale[r].repeat_interleave(g)) @ H[:, B]) @ v, v @ H[B, B] @ v
            new = (scale[r, k] + slope / curvature).to(scale_dtype).double()
            step = new - scale[r, k]
            if step * (2 * slope - step * curvature) > 0 and new > 0:
                scale[r, k] = new
            low, high = grid.q_min - float(grid.zero[r, k]), grid.q_max - float(grid.zero[r, k])
            for i in range(B.start, B.stop):
                e = W[r] - V[r] * scale[r].repeat_interleave(g)
                best = V[r, i] + (e @ H[:, i]) / (H[i, i] * scale[r, k])
                V[r, i] = best.round().clamp(low, high)
    Q = (V.reshape(len(Q), -1, g) + grid.zero.double().unsqueeze(-1)).flatten(1).to(torch.int8)
    return Q, dataclasses.replace(grid, scale=scale.float())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "columns"), [(16, 64), (144, 144)])
def test_against_one_coordinate_after_the_other_in_float64(symmetric, group_size, columns):
    W, H, Q, grid = problem(rows=4, columns=columns, group_size=group_size, symmetric=symmetric)
    ours, theirs = refine(W, Q, grid, H, 1, 0.0, torch.float16), naive(W, Q, grid, H, torch.float16)
    assert int(ours[0].ne(theirs[0]).sum()) <= 0.02 * Q.numel()  # a tie may fall the other way in float32
    assert float(error(W, *ours, H).sum()) == pytest.approx(float(error(W, *theirs, H).sum()), rel=5e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_two_passes_save_some_percent(bits):
    W, H, Q, grid = problem(rows=64, bits=bits)
    refined = refine(W, Q, grid, H, 2, 0.0, torch.float16)
    assert float(error(W, *refined, H).sum()) < 0.96 * float(error(W, Q, grid, H).sum())


def test_rows_do_not_meet():
    W, H, Q, grid = problem()
    whole = refine(W, Q, grid, H, 2, 0.0, torch.float16)
    part = dataclasses.replace(grid, scale=grid.scale[:5], zero=grid.zero[:5])
    alone = refine(W[:5], Q[:5], part, H, 2, 0.0, torch.float16)
    assert torch.equal(alone[0], whole[0][:5])
    assert torch.equal(alone[1].scale, whole[1].scale[:5])


def test_pass_that_gains_too_little_is_the_last():
    W, H, Q, grid = problem()
    once = refine(W, Q, grid, H, 1, 0.0, torch.float16)
    stopped = refine(W, Q, grid, H, 9, 0.999, torch.float16)
    assert torch.equal(stopped[0], once[0])
    assert not torch.equal(refine(W, Q, grid, H, 9, 0.0, torch.float16)[0], once[0])


def test_new_scales_are_exact_in_the_stored_dtype_and_positive():
    W, H, Q, grid = problem()
    scale = refine(W, Q, grid, H, 3, 0.0, torch.bfloat16)[1].scale
    kept = scale == grid.scale
    assert torch.equal(scale[~kept], scale[~kept].bfloat16().float())
    assert bool((~kept).any())
    assert bool((scale > 0).all())


def test_dead_columns_and_zero_rows_stay_as_they_are():
    W, H, Q, grid = problem()
    H[3], H[:, 3] = 0, 0
    W[2], Q[2] = 0, 0
    refined, _ = refine(W, Q, grid, H, 2, 0.0, torch.float16)
    assert torch.equal(refined[:, 3], Q[:, 3])
    assert not refined[2].any()


def test_zero_passes_change_nothing():
    W, H, Q, grid = problem()
    refined, same = refine(W, Q, grid, H, 0, 0.0, torch.float16)
    assert torch.equal(refined, Q)
    assert torch.equal(same.scale, grid.scale)
