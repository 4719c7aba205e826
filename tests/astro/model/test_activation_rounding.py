"""Inputs on a server's grid, against the definition in float64."""

import pytest
import torch

from astro.activation_config import ActivationScheme
from astro.model.activation_rounding import round_activations
from tests.support.devices import here
from tests.support.models import correlated_inputs

pytestmark = pytest.mark.usefixtures("device")

INT8, INT4, FP8 = ActivationScheme(8, "int"), ActivationScheme(4, "int"), ActivationScheme(8, "float")
SCHEMES = [pytest.param(INT8, id="int8"), pytest.param(INT4, id="int4"), pytest.param(FP8, id="fp8")]


def outlying_inputs():
    """Correlated tokens with a channel a hundred times the others, a token of zeros, and one of tiny numbers."""
    X = correlated_inputs(64, 48)
    X[:, 7] *= 100
    X[5] = 0
    X[6] *= 1e-9
    return X


def grid_points(scheme):
    """Every number of a grid before it is scaled, float64."""
    if scheme.type == "int":
        return torch.arange(-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1), dtype=torch.float64)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return codes[codes.isfinite()].unique()


def scales(X, scheme):
    maximum, least = (448.0, 1 / (448 * 512)) if scheme.type == "float" else (2.0 ** (scheme.bits - 1) - 1, 1e-30)
    return (X.abs().amax(-1, keepdim=True) / maximum).clamp(min=least)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_the_nearest_point_of_the_grid(scheme, dtype):
    X = outlying_inputs().to(dtype)
    rounded = round_activations(X.to(here()), scheme).cpu()
    assert rounded.dtype == dtype
    scale = scales(X.double(), scheme)
    nearest = (X.double() / scale).unsqueeze(-1).sub(grid_points(scheme)).abs().amin(-1) * scale
    # float32 may take the other of two points that are equally near, and the dtype rounds what comes of it.
    slack = X.double().abs() * torch.finfo(dtype).eps + scale * 1e-4 + torch.finfo(dtype).tiny
    assert ((rounded.double() - X.double()).abs() <= nearest + slack).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_token_is_rounded_for_itself_in_any_shape(scheme):
    X = outlying_inputs().float().to(here())
    alone = torch.stack([round_activations(token, scheme) for token in X])
    assert torch.equal(round_activations(X, scheme), alone)
    assert torch.equal(round_activations(X.reshape(4, 16, 48), scheme).flatten(0, 1), alone)
    assert round_activations(X[:0], scheme).shape == (0, 48)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_rounded_stays_as_it_is_if_it_is_rounded_again(scheme):
    once = round_activations(outlying_inputs().float().to(here()), scheme)
    torch.testing.assert_close(round_activations(once, scheme), once, rtol=1e-6, atol=0)


def test_ties_go_to_the_even_integer():
    X = torch.tensor([[7.0, 0.5, 1.5, -2.5, -0.5]]).to(here())
    assert round_activations(X, INT4).tolist() == [[7.0, 0.0, 2.0, -2.0, 0.0]]


def test_largest_number_is_kept_and_zeros_are_zeros():
    X = outlying_inputs().float().to(here())
    for scheme in (INT8, INT4):
        torch.testing.assert_close(round_activations(X, scheme).abs().amax(-1), X.abs().amax(-1), rtol=1e-6, atol=0)
    assert not round_activations(X, FP8)[5].any()
    assert not round_activations(X, INT4)[5].any()


def test_tiny_numbers_are_lost_in_fp8_as_on_a_server():
    # vLLM's least scale is 1 / (448 · 512), and the least number of the grid is 2⁻⁹ of it.
    X = torch.tensor([[2e-9, -2e-9]]).to(here())
    assert not round_activations(X, FP8).any()
    assert round_activations(X, INT8).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_token_with_a_number_that_is_not_finite_becomes_nan(scheme, bad):
    X = torch.tensor([[1.0, bad, 2.0], [1.0, 2.0, 3.0]]).to(here())
    rounded = round_activations(X, scheme)
    assert rounded[0].isnan().all()
    assert rounded[1].isfinite().all()
