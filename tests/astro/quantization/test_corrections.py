"""Corrections of the layers of input groups: which layers get one, what they take, what is recorded."""

import pytest
import torch

from astro.activation_config import ActivationScheme, Reconstruction
from astro.calibration.drift import DriftAccumulator
from astro.calibration.input_sums import InputSums, SumKind, side_by_side
from astro.config import Quantization, Regularizer
from astro.errors import NumericalError
from astro.linalg import tiling
from astro.linalg.symmetric import layer_error
from astro.model.activation_rounding import round_activations
from astro.quantization.compensation import behind_errors, compensate
from astro.quantization.input_group import quantize_input_groups
from astro.quantization.prepared_groups import prepare_input_groups
from astro.quantization.recipe import Corrections, InputMoments, Recipe
from tests.support.devices import here
from tests.support.models import correlated_inputs, random_weights

pytestmark = pytest.mark.usefixtures("device")

NONE = Regularizer(name="none")


def recipe(layers, rank=4, dtype=torch.float32, regularization=NONE, columns=(), **changes):
    settings = Quantization(**{"group_size": 16, "bits": 3, **changes})
    energy = {"energy": 0.8} if rank == "auto" else {}
    held = dict.fromkeys(layers, columns)
    corrections = Corrections(Reconstruction(rank=rank, **energy), frozenset(layers), dtype, columns=held)
    return settings, Recipe(settings, regularization, torch.float16, corrections=corrections if layers else None)


def run(groups, inputs, layers, **changes):
    settings, how = recipe(layers, **changes)
    columns = inputs.H.shape[-1]
    return quantize_input_groups(groups, inputs, [100] * len(groups), settings.scheme("a", columns), how)


def hessian(columns=48, seed=0):
    X = correlated_inputs(300, columns, seed).float()
    return X.T @ X / len(X)


def outliers():
    X = correlated_inputs(400, 48).float().to(here())
    X[:, :3] *= 10
    return X


@pytest.fixture
def inputs():
    return InputMoments(hessian()[None])


@pytest.fixture
def W():
    return random_weights(20, 48)


def with_correction(layer):
    return layer.dequantize() + layer.correction.B.float() @ layer.correction.A.float()


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("regularization", [NONE, Regularizer(beta=1e-3)])
def test_the_recorded_error_is_that_of_layer_and_correction(inputs, W, method, regularization):
    groups = [{"q": W[:12], "k": W[12:]}]
    plain, (before,) = run(groups, inputs, (), method=method, regularization=regularization)
    layers, (record,) = run(groups, inputs, ("q", "k"), method=method, regularization=regularization)
    assert all(torch.equal(layers[name].Q, plain[name].Q) for name in plain)
    W_hat = torch.cat([with_correction(layers[name]) for name in ("q", "k")])
    energy = layer_error(W[None], torch.zeros_like(W)[None], inputs.H).sum()
    expected = float(layer_error(W[None], W_hat[None], inputs.H).sum() / energy)
    assert record.relative_error == pytest.approx(expected, rel=1e-3)
    assert record.solved_error == pytest.approx(before.relative_error)
    assert record.relative_error < 0.8 * before.relative_error
    assert record.ranks == {"q": 4, "k": 4}
    assert record.correction_weights == 4 * (12 + 48) + 4 * (8 + 48)
    assert record.seconds["reconstruct"] > 0


def test_without_corrections_nothing_is_recorded_of_them(inputs, W):
    layers, (record,) = run([{"a": W}], inputs, ())
    assert layers["a"].correction is None
    assert (record.solved_error, record.ranks, record.correction_weights) == (None, {}, 0)


def test_only_the_layers_that_are_named_get_one(inputs, W):
    layers, (record,) = run([{"q": W[:12], "k": W[12:]}], inputs, ("k",))
    assert layers["q"].correction is None
    assert record.ranks == {"k": 4}


def test_each_member_is_corrected_as_if_it_were_alone(inputs, W):
    together, _ = run([{"q": W[:12], "k": W[12:]}], inputs, ("q", "k"))
    for name, rows in (("q", slice(0, 12)), ("k", slice(12, 20))):
        alone, _ = run([{name: W[rows]}], inputs, (name,))
        assert torch.allclose(with_correction(together[name]), with_correction(alone[name]), atol=1e-4)


def test_input_groups_side_by_side_are_corrected_as_alone(W):
    H = torch.stack([hessian(seed=seed) for seed in range(3)])
    groups = [{f"e{i}": random_weights(20, 48, seed=i)} for i in range(3)]
    together, records = run(groups, InputMoments(H), ("e0", "e1", "e2"))
    for i, group in enumerate(groups):
        alone, (record,) = run([group], InputMoments(H[i : i + 1]), (f"e{i}",))
        assert torch.allclose(with_correction(together[f"e{i}"]), with_correction(alone[f"e{i}"]), atol=1e-4)
        assert records[i].relative_error == pytest.approx(record.relative_error, rel=1e-3)


def test_auto_may_choose_another_rank_for_every_member(inputs, W):
    _, (record,) = run([{"q": W[:18], "k": W[18:]}], inputs, ("q", "k"), rank="auto")
    assert record.ranks["k"] <= 2 < record.ranks["q"]
    assert record.relative_error <= 0.2 * record.solved_error * 1.05


def test_tiles_of_rows_do_not_change_the_errors_that_are_corrected(inputs, W, monkeypatch):
    whole, _ = run([{"a": W}], inputs, ("a",))
    monkeypatch.setattr(tiling, "row_tile", lambda *_: 4)
    tiled, _ = run([{"a": W}], inputs, ("a",))
    assert torch.allclose(with_correction(tiled["a"]), with_correction(whole["a"]), atol=1e-5)


def test_with_drift_what_the_solve_aimed_at_is_what_is_corrected(W):
    X, D = correlated_inputs(300, 48).float(), 0.1 * correlated_inputs(300, 48, seed=5).float()
    H, sums = X.T @ X / 300, DriftAccumulator(48, here())
    sums.add_(X + D, X)
    inputs = InputMoments(H[None], sums.finish_("a", torch.ones(48))[None])
    settings, how = recipe(("a",), rank=20, compensation=0.5)
    layers, _ = quantize_input_groups([{"a": W}], inputs, [300], settings.scheme("a", 48), how)
    target = compensate(prepare_input_groups(["a"], W[None], inputs, settings.scheme("a", 48), how), W[None])[0]
    assert not torch.allclose(target, W, atol=1e-3)
    assert torch.allclose(with_correction(layers["a"]), target, atol=1e-4)  # rank 20 of 20 rows leaves nothing


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("compensation", [0.0, 1.0])
@pytest.mark.parametrize("held", [(), (1, 2)])
def test_with_rounded_inputs_the_recorded_error_is_that_of_what_is_served(W, bits, compensation, held):
    scheme, X, D = (
        ActivationScheme(bits, "int"),
        outliers(),
        0.1 * correlated_inputs(400, 48, seed=5).float().to(here()),
    )
    sums = InputSums(48, here(), SumKind(scheme, has_drift=True, has_rounding_drift=True), "none")
    for x, d in zip(X.split(16), D.split(16), strict=True):  # every token is in the sample
        sums.drift.add_(x + d, x, None, sums.add_(x))
    H, drift, rounding = sums.finish_("a")
    inputs = InputMoments(H[None], drift[None], rounding=side_by_side([rounding], 48))
    settings, how = recipe(("q", "k"), compensation=compensation, columns=held)
    groups, scheme_of_rows = [{"q": W[:12], "k": W[12:]}], settings.scheme("q", 48)
    layers, (record,) = quantize_input_groups(groups, inputs, [400], scheme_of_rows, how)
    prepared = prepare_input_groups(["q+k"], W[None], inputs, scheme_of_rows, how)
    wanted, read = X @ behind_errors(prepared, W[None])[0].T, round_activations(X, scheme)
    served = [
        read @ layer.dequantize().T + X @ layer.correction.A.T @ layer.correction.B.T for layer in layers.values()
    ]
    expected = (torch.cat(served, dim=-1) - wanted).square().sum() / wanted.square().sum()
    assert record.relative_error == pytest.approx(float(expected), rel=1e-3)
    assert record.output_energy == pytest.approx(float(wanted.square().sum()) / 400, rel=1e-3)
    alone = torch.cat([read @ layer.dequantize().T for layer in layers.values()], dim=-1)
    expected = (alone - wanted).square().sum() / wanted.square().sum()
    assert record.solved_error == pytest.approx(float(expected), rel=1e-3)


def test_factors_are_stored_in_the_dtype_that_is_asked_for(inputs, W):
    layers, (record,) = run([{"a": W}], inputs, ("a",), dtype=torch.float16)
    correction = layers["a"].correction
    assert (correction.A.dtype, correction.B.dtype, correction.A.device.type) == (torch.float16,) * 2 + (here().type,)
    _, (exact,) = run([{"a": W}], inputs, ("a",))
    assert record.relative_error == pytest.approx(exact.relative_error, rel=1e-3)


def test_factors_that_overflow_are_refused(W):
    inputs = InputMoments(1e-12 * hessian()[None])
    with pytest.raises(NumericalError, match="a: its correction of low rank is not finite in torch.float16"):
        run([{"a": W}], inputs, ("a",), dtype=torch.float16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rank": -1}, "rank"), ({"rank": "auto", "energy": 0.0}, "energy"), ({"rank": 8, "energy": 0.5}, "only with")],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        Reconstruction(**changes)
