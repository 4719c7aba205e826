"""Columns that corrections hold alone: what is solved, what is left, and what is recorded, against naive sums."""

import pytest
import torch

from astro.activation_config import Activations, Reconstruction
from astro.calibration.channel_statistics import ChannelStatistics
from astro.config import Quantization, Regularizer
from astro.quantization.held_columns import HeldColumns
from astro.quantization.input_group import quantize_input_groups
from astro.quantization.recipe import Corrections, InputMoments, Recipe
from astro.quantization.smoothing import row_factors
from tests.support.devices import here
from tests.support.models import correlated_inputs, random_weights

pytestmark = pytest.mark.usefixtures("device")

COLUMNS, HELD = 48, (3, 17, 40)
MEMBERS = {"q": slice(0, 12), "k": slice(12, 20)}


@pytest.fixture
def X():
    return correlated_inputs(300, COLUMNS).float().to(here())


@pytest.fixture
def W():
    weights = random_weights(20, COLUMNS).to(here())
    weights[:, HELD] *= 30  # as smoothing leaves them
    return weights


def recipe(held, rank=8, group_size=-1):
    columns = dict.fromkeys(MEMBERS, held) if held else {}
    corrections = Corrections(Reconstruction(rank=rank), frozenset(MEMBERS), torch.float32, columns=columns)
    return Recipe(Quantization(bits=4, group_size=group_size), Regularizer(), torch.float16, corrections=corrections)


def run(W, X, held=HELD, widths=()):
    how = recipe(held)
    groups = [{name: W[rows] for name, rows in MEMBERS.items()}]
    inputs = InputMoments((X.T @ X / len(X))[None])
    layers, (record,) = quantize_input_groups(groups, inputs, [300], how.solver.scheme("q", COLUMNS), how, widths)
    return layers, record


def naive(layers, W, X, is_corrected):
    """The error and the energy of the outputs, in float64."""
    error = energy = 0.0
    for name, rows in MEMBERS.items():
        W_hat = layers[name].dequantize().double()
        if is_corrected:
            correction = layers[name].correction
            W_hat = W_hat + correction.B.double() @ correction.A.double()
        wanted = X.double() @ W[rows].double().T
        error += float((X.double() @ W_hat.T - wanted).square().sum())
        energy += float(wanted.square().sum())
    return error / len(X), energy / len(X)


def test_recorded_errors_are_those_of_all_columns(W, X):
    layers, record = run(W, X)
    after, energy = naive(layers, W, X, is_corrected=True)
    before, _ = naive(layers, W, X, is_corrected=False)
    assert record.output_energy == pytest.approx(energy, rel=1e-4)
    assert record.relative_error == pytest.approx(after / energy, rel=1e-2)
    assert record.solved_error == pytest.approx(before / energy, rel=1e-3)
    assert record.solved_error > 0.5, "without its correction the layer is of no use"


def test_less_is_left_than_where_the_grid_reaches_these_columns(W, X):
    held, plain = (run(W, X, columns)[1] for columns in (HELD, ()))
    assert held.relative_error < 0.3 * plain.relative_error
    assert held.output_energy == pytest.approx(plain.output_energy, rel=1e-4)


def test_grid_does_not_reach_them_and_weights_stay_what_they_were(W, X):
    before = W.clone()
    layers, _ = run(W, X)
    plain, _ = run(W, X, ())
    assert torch.equal(W, before)
    for name, layer in layers.items():
        assert layer.grid.scale.abs().amax() < 0.2 * plain[name].grid.scale.abs().amax()
        rest = layer.dequantize()[:, list(HELD)].abs().amax()
        assert rest < 0.1 * W[:, list(HELD)].abs().amax()


def test_errors_of_widths_are_relative_to_all_columns_too(W, X):
    """So that a width budget compares them with those of other layers."""
    _, record = run(W, X, widths=(2, 4))
    layers, _ = run(W, X)
    rest = W.clone()
    rest[:, list(HELD)] = 0
    _, energy = naive(layers, rest, X, is_corrected=False)
    _, alone = run(rest, X, (), widths=(2, 4))
    for bits, error in record.width_errors.items():
        assert error == pytest.approx(alone.width_errors[bits] * energy / record.output_energy, rel=1e-3)


def test_columns_are_put_back_for_a_while():
    W = torch.arange(24.0).view(2, 3, 4).to(here())
    whole = W.clone()
    corrections = Corrections(Reconstruction(rank=2), frozenset("ab"), torch.float32, columns={"a": (1, 3)})
    how = Recipe(Quantization(), Regularizer(), torch.float16, corrections=corrections)
    held = HeldColumns.taken_from_(W, [["a"], ["b"]], how)
    assert not W[0, :, [1, 3]].any()
    assert torch.equal(W[0, :, [0, 2]], whole[0, :, [0, 2]])
    assert torch.equal(W[1], whole[1])
    with held.put_back(W):
        assert torch.equal(W, whole)
    assert not W[0, :, [1, 3]].any()


@pytest.mark.parametrize(
    ("smoothing", "rank", "holds"),
    [("aser", 32, True), ("aser", 64, True), ("aser", 31, False), ("aser", 0, False), ("aser", "auto", False),
     ("smoothquant", 64, False), ("none", 64, False)],
)  # fmt: skip
def test_channels_are_held_where_there_is_rank_for_all_of_them(smoothing, rank, holds):
    assert Reconstruction(rank=rank).holds_channels(Activations(bits=8, smoothing=smoothing)) == holds


@pytest.mark.parametrize(("shared", "expected"), [(1, 6), (2, 6), (3, 6), (4, 4)])
def test_channels_of_one_row_are_no_more_than_asked_for(shared, expected):
    """Heads of queries share one of values, whose row makes a channel of each."""
    rows = torch.arange(24 // shared).repeat_interleave(shared).to(here())
    statistics = [ChannelStatistics(*random_weights(2, 24, seed=seed).abs().double().to(here())) for seed in (1, 2)]
    settings = Activations(bits=8, smoothing="aser", outlier_channels=6)
    factors = row_factors(settings, *statistics, rows, 24 // shared)
    assert int((factors[rows] != 1).sum()) <= expected
