"""The grid: published scales, rounding, the search."""

import re

import pytest
import torch

from astro.config import LayerScheme, SolverSettings
from astro.errors import ConfigError, NumericalError
from astro.quantization import grid as grid_module
from astro.quantization.grid import Grid, QuantizedLinear, require_finite_scales
from tests.support.models import random_weights

pytestmark = pytest.mark.usefixtures("device")


def fit_grid(W, scale_dtype, cost=None, search="minmax", signed=True, **changes):
    settings = SolverSettings(scale_search=search, signed_scales=signed)
    return grid_module.fit_grid(W, LayerScheme(**{"group_size": 16, **changes}), settings, scale_dtype, cost)


def test_minmax_symmetric_scale_is_the_published_one():
    W = random_weights(3, 32)
    grid = fit_grid(W, torch.float32, bits=4)
    torch.testing.assert_close(grid.scale, W.reshape(3, 2, 16).abs().amax(-1) / 7)
    assert not grid.zero.any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, 32, -1])
def test_rounding_error_is_at_most_half_a_step(bits, symmetric, group_size):
    W = random_weights(5, 32)
    grid = fit_grid(W, torch.float32, bits=bits, symmetric=symmetric, group_size=group_size)
    Q = grid.quantize(W)
    assert Q.dtype == torch.int8
    assert int(Q.min()) >= grid.q_min
    assert int(Q.max()) <= grid.q_max
    step = grid.scale.repeat_interleave(grid.group_size, dim=1)
    # an asymmetric zero point is rounded as well, which can cost another half step at the ends
    assert bool(((grid.dequantize(Q) - W).abs() <= step * (0.5001 if symmetric else 1.0001)).all())


def test_quantize_then_dequantize_is_a_fixed_point():
    W = random_weights(4, 32)
    grid = fit_grid(W, torch.float16, symmetric=False)
    Q = grid.quantize(W)
    assert torch.equal(grid.quantize(grid.dequantize(Q)), Q)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_search_never_loses_to_minmax_in_its_own_error(bits, symmetric):
    W = random_weights(16, 64)
    errors = {}
    for search in ("minmax", "mse"):
        grid = fit_grid(W, torch.float32, search=search, bits=bits, symmetric=symmetric)
        errors[search] = (grid.dequantize(grid.quantize(W)) - W).abs().pow(2.4).reshape(16, 4, 16).sum(-1)
    assert bool((errors["mse"] <= errors["minmax"]).all())
    assert float(errors["mse"].sum()) < 0.97 * float(errors["minmax"].sum())


def test_scales_are_exact_in_their_stored_dtype():
    grid = fit_grid(random_weights(4, 32), torch.bfloat16)
    assert torch.equal(grid.scale, grid.scale.to(torch.bfloat16).float())


def test_zero_group_stays_zero_and_finite():
    W = random_weights(2, 32)
    W[:, :16] = 0
    grid = fit_grid(W, torch.float16, search="mse")
    assert bool(torch.isfinite(grid.scale).all())
    assert not grid.dequantize(grid.quantize(W))[:, :16].any()


def test_weights_too_large_for_the_stored_dtype_are_refused():
    grid = fit_grid(random_weights(2, 16) * 1e7, torch.float16)
    with pytest.raises(NumericalError, match="layer x: a scale is not finite"):
        require_finite_scales(grid, ["layer x"])


@pytest.mark.parametrize(("columns", "fitting"), [(576, "32, 64, -1"), (160, "32, -1"), (200, "-1")])
def test_group_size_that_divides_nothing_names_sizes_that_do_and_that_servers_take(columns, fitting):
    message = f"of {columns} input columns; sizes that do, and that servers' kernels take: {fitting} (-1 is one scale a"
    with pytest.raises(ConfigError, match=re.escape(message)):
        LayerScheme(group_size=128).columns_per_group(columns)


def test_against_naive_float64_rounding():
    W = random_weights(3, 16)
    grid = Grid(torch.tensor([[0.1], [0.2], [0.3]]), torch.tensor([[1.0], [-2.0], [0.0]]), 4, 16, False)
    expected = [
        [min(7, max(-8, round(float(w) / float(s)) + int(z))) for w in row]
        for row, s, z in zip(W.double(), grid.scale[:, 0], grid.zero[:, 0], strict=True)
    ]
    assert grid.quantize(W).tolist() == expected


@pytest.mark.parametrize("symmetric", [True, False])
def test_hessian_search_against_trying_every_shrink_in_float64(symmetric):
    W, cost = random_weights(64, 32), torch.rand(32, generator=torch.Generator().manual_seed(3)) ** 4

    def error(grid):
        squared = (grid.dequantize(grid.quantize(W)) - W).double().square() * cost.double()
        return squared.reshape(64, 2, 16).sum(-1)

    searched = error(fit_grid(W, torch.float32, cost, "hessian", bits=3, symmetric=symmetric))
    best = torch.full((64, 2), torch.inf, dtype=torch.float64)
    for i in range(37):
        low, high = (getattr(W.reshape(64, 2, 16), end)(-1) * (1 - 0.02 * i) for end in ("amin", "amax"))
        low, high = low.clamp(max=0), high.clamp(min=0)
        high = torch.maximum(-low, high) if symmetric else high
        scale = high / 3 if symmetric else (high - low) / 7
        zero = torch.zeros_like(scale) if symmetric else (-4 - low / scale).round().clamp(-4, 3)
        tried = error(Grid(scale, zero, 3, 16, symmetric))
        # In steps of 6 %, then 2 % to either side of the best.
        assert i % 3 or bool((searched <= tried * (1 + 1e-5)).all())
        best = torch.minimum(best, tried)
    assert float(searched.sum()) < 1.01 * float(best.sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_signed_scales_reach_further_on_the_longer_side(bits):
    W = random_weights(64, 32)
    errors = {}
    for signed in (False, True):
        grid = fit_grid(W, torch.float16, torch.ones(32), "hessian", signed, bits=bits)
        errors[signed] = (grid.dequantize(grid.quantize(W)) - W).square().reshape(64, 2, 16).sum(-1)
        assert bool((grid.scale < 0).any()) == signed
    # The last step of the search is taken on one side alone.
    assert bool((errors[True] <= 1.5 * errors[False]).all())
    assert float((errors[True] <= errors[False]).float().mean()) > 0.95
    assert float(errors[True].sum()) < 0.95 * float(errors[False].sum())


def test_hessian_search_spends_its_precision_where_columns_cost_most():
    W, cost = random_weights(64, 16), torch.full((16,), 1e-3)
    cost[:4] = 1.0
    errors = {}
    for search in ("mse", "hessian"):
        grid = fit_grid(W, torch.float32, cost, search, bits=2)
        errors[search] = float((grid.dequantize(grid.quantize(W)) - W)[:, :4].square().sum())
    assert errors["hessian"] < 0.8 * errors["mse"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_are_written_in_parts_as_they_are_computed_as_a_whole(symmetric):
    W = random_weights(600, 512)  # more than a CPU works on at once
    grid = fit_grid(W, torch.bfloat16, torch.ones(512), symmetric=symmetric)
    layer = QuantizedLinear(grid.quantize(W), grid)
    zero = grid.zero.repeat_interleave(16, dim=1)
    expected = (layer.Q.float() - zero) * grid.scale.repeat_interleave(16, dim=1)
    assert torch.equal(layer.dequantize(), expected)
    turned = torch.empty(512, 600, dtype=torch.bfloat16).T
    layer.dequantize_into_(turned)
    assert torch.equal(turned, expected.bfloat16())
    assert torch.equal(layer.dequantize(torch.bfloat16), turned)
