"""An input group of linear layers: stacking, tiling, what is recorded."""

import pytest
import torch

from astro.config import Quantization, Regularizer
from astro.errors import NumericalError
from astro.linalg import tiling
from astro.linalg.symmetric import layer_error
from astro.quantization.input_group import quantize_input_groups
from astro.quantization.recipe import InputMoments, Recipe
from tests.support.models import correlated_inputs, random_weights

pytestmark = pytest.mark.usefixtures("device")

NONE, ASTRO = Regularizer(name="none"), Regularizer(beta=1e-3)


def run(weights, H, regularization=ASTRO, **changes):
    settings = Quantization(**{"group_size": 16, "bits": 3, **changes})
    recipe = Recipe(settings, regularization, torch.float16)
    quantized, (record,) = quantize_input_groups(
        [dict(weights)], InputMoments(H[None]), [100], settings.scheme("a", H.shape[-1]), recipe
    )
    return quantized, record


@pytest.fixture
def H():
    X = correlated_inputs(300, 48).float()
    return X.T @ X / 300


@pytest.mark.parametrize("regularization", [NONE, ASTRO, Regularizer(solver="pgd", iterations=20)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_recorded_error_is_the_error_of_what_is_returned(H, regularization, symmetric):
    W = random_weights(10, 48)
    quantized, record = run([("a", W)], H, regularization, symmetric=symmetric)
    W_hat = quantized["a"].dequantize()
    expected = layer_error(W, W_hat, H).sum() / layer_error(W, torch.zeros_like(W), H).sum()
    assert record.relative_error == pytest.approx(float(expected), rel=1e-4)
    assert record.relative_error < 0.1


def test_members_are_cut_out_of_the_stack(H):
    W = random_weights(10, 48)
    whole, _ = run([("all", W)], H, NONE)
    parts, record = run([("q", W[:6]), ("k", W[6:])], H, NONE)
    assert record.name == "q+k"
    assert torch.equal(torch.cat([parts["q"].Q, parts["k"].Q]), whole["all"].Q)
    assert torch.equal(parts["k"].grid.scale, whole["all"].grid.scale[6:])


def test_tiles_do_not_change_the_result(H, monkeypatch):
    W = random_weights(10, 48)
    whole, _ = run([("a", W)], H, NONE)
    monkeypatch.setattr(tiling, "row_tile", lambda *_: 4)
    tiled, _ = run([("a", W)], H, NONE)
    assert torch.equal(tiled["a"].Q, whole["a"].Q)


def test_regularizer_shrinks_group_maxima_and_says_so(H):
    W = random_weights(10, 48)
    assert run([("a", W)], H, NONE)[1].group_maximum_ratio == pytest.approx(1.0)
    assert run([("a", W)], H, ASTRO)[1].group_maximum_ratio < 0.98


@pytest.mark.parametrize("bits", [2, 3])
def test_astro_lowers_the_layer_error_at_low_widths(H, bits):
    W = random_weights(64, 48)
    errors = [run([("a", W)], H, r, bits=bits, scale_search="minmax")[1].relative_error for r in (NONE, ASTRO)]
    assert errors[1] < errors[0]


def test_rounding_needs_no_factorization(H):
    W = random_weights(10, 48)
    quantized, record = run([("a", W)], H, NONE, method="rtn")
    assert record.factorizations == 0
    assert torch.equal(quantized["a"].Q, quantized["a"].grid.quantize(W))


def test_dead_inputs_are_rounded_and_stay_finite(H):
    H[5], H[:, 5] = 0, 0
    quantized, record = run([("a", random_weights(6, 48))], H)
    assert record.relative_error < 0.1
    assert bool(torch.isfinite(quantized["a"].dequantize()).all())


def test_weights_that_are_not_finite_are_an_error(H):
    W = random_weights(6, 48)
    W[2, 3] = float("nan")
    with pytest.raises(NumericalError, match="a: "):
        run([("a", W)], H, NONE)
