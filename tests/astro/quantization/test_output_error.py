"""The error of outputs behind rounded inputs, and what weights make up for, against float64."""

import pytest
import torch

from astro.activation_config import ActivationScheme
from astro.calibration.input_sums import RoundingMoments
from astro.config import LayerScheme, Regularizer, SolverSettings
from astro.model.activation_rounding import round_activations
from astro.quantization.input_group import quantize_input_groups
from astro.quantization.recipe import InputMoments, Recipe
from tests.support.devices import here
from tests.support.models import correlated_inputs, random_weights

pytestmark = pytest.mark.usefixtures("device")

INT4 = ActivationScheme(4, "int")


def moments(X, with_drift=True):
    """The moments of all tokens: each of them is in the sample, and nothing is shrunk."""
    rounded = round_activations(X, INT4)
    d = X - rounded
    drift = (d.T @ rounded / len(X))[None] if with_drift else None
    rounding = RoundingMoments((torch.cat([rounded, d], dim=-1) / len(X) ** 0.5)[None], drift)
    return InputMoments((rounded.T @ rounded / len(X))[None], rounding=rounding)


def solve(W, inputs, **settings):
    recipe = Recipe(SolverSettings(**settings), Regularizer(name="none"), torch.float32)
    members, records = quantize_input_groups([{"q": W}], inputs, [1], LayerScheme(bits=4, group_size=16), recipe)
    return members["q"].dequantize(), records[0]


def mean_square(X):
    return X.double().square().sum(-1).mean().item()


@pytest.mark.parametrize("settings", [{}, {"refine_passes": 0}, {"compensation": 0.5}, {"method": "rtn"}], ids=str)
def test_recorded_error_is_that_of_the_outputs(settings):
    X, W = correlated_inputs(400, 32).float().to(here()), random_weights(24, 32).to(here())
    W_hat, record = solve(W, moments(X), **settings)
    wanted = X @ W.T
    error = mean_square(round_activations(X, INT4) @ W_hat.T - wanted)
    assert record.output_energy == pytest.approx(mean_square(wanted), rel=1e-5)
    assert record.relative_error == pytest.approx(error / mean_square(wanted), rel=1e-5)


def test_input_group_without_statistics_keeps_the_error_of_its_weights():
    W = random_weights(24, 32).to(here())
    known = moments(correlated_inputs(400, 32).float().to(here()))
    nothing = RoundingMoments(torch.zeros_like(known.rounding.sample), torch.zeros_like(known.rounding.drift))
    eye = torch.eye(32, device=here())[None]
    _, record = solve(W, InputMoments(eye, lacks_statistics=[True], rounding=nothing))
    _, expected = solve(W, InputMoments(eye, lacks_statistics=[True]))
    assert record.relative_error == expected.relative_error > 0


def test_weights_make_up_for_rounded_inputs_on_other_tokens_too():
    X, W = correlated_inputs(4000, 32).float().to(here()), random_weights(24, 32).to(here())
    seen, other = X[:2000], X[2000:]
    errors = {}
    for with_drift in (False, True):
        W_hat, _ = solve(W, moments(seen, with_drift))
        errors[with_drift] = mean_square(round_activations(other, INT4) @ W_hat.T - other @ W.T)
    assert errors[True] < 0.95 * errors[False]
