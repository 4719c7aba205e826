"""Rounding between learned clips and its gradients against float64; the same grid in the numbers that files tell."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize

from astro.activation_config import ActivationScheme
from astro.config import LayerScheme
from astro.errors import CheckpointError
from astro.formats.compressed_tensors import quantization_config
from astro.model.activation_rounding import round_activations
from astro.model.clipped_rounding import InputClips, round_clipped
from tests.support.devices import here
from tests.support.finite_differences import differences

pytestmark = pytest.mark.usefixtures("device")

GRID = InputClips.between(-1.0, 2.0, 4)
RANGES = [(-4.0, 4.0), (-0.37, 1.913), (0.0, 6.1), (-2e-3, 1e-3), (1.5, 2.25), (-30.0, -7.0)]


def inputs(low, high, seed=0):
    """Inputs of which some lie outside the clips."""
    return torch.randn(64, 48, generator=torch.Generator().manual_seed(seed)) * (high - low) / 2 + (high + low) / 2


def assert_same_levels(found, expected, step):
    """The same levels, but for inputs that lie halfway between two, as float32 has it."""
    torch.testing.assert_close(found, expected, atol=step * 1.001, rtol=0)
    assert ((found - expected).abs() > step * 1e-3).sum() <= len(found.flatten()) // 1000


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ends", RANGES, ids=str)
def test_against_training_and_the_readers_of_the_format(ends, bits):
    grid, X = InputClips.between(*ends, bits), inputs(*ends).to(here())
    assert (grid.low, grid.high) == pytest.approx(ends, abs=1e-5 * (ends[1] - ends[0]))
    found = round_activations(X, grid)
    assert len(found.unique()) == 2**bits
    assert_same_levels(found, round_clipped(X, torch.tensor(ends, device=X.device), bits), grid.scale)
    scheme = ActivationScheme(bits, "int", is_static=True)
    config = quantization_config({"m.q": LayerScheme()}, [], "static", scheme)
    args = QuantizationArgs.model_validate(config["config_groups"]["group_0"]["input_activations"])
    tensors = (torch.tensor([number], device=X.device) for number in (grid.scale, grid.zero_point))
    assert_same_levels(found, fake_quantize(X, *tensors, args), grid.scale)


def test_what_a_file_tells_gives_the_same_bits():
    grid = InputClips.between(-0.37, 1.913, 4)
    stored = torch.tensor([grid.scale, grid.zero_point], dtype=torch.float32)
    assert InputClips(4, *stored.tolist()) == grid


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_and_shape_stay(dtype):
    X = inputs(-1.0, 2.0).to(here(), dtype)
    rounded = round_activations(X, GRID)
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded, GRID.round(X.float()).to(dtype))
    assert torch.equal(round_activations(X.reshape(4, 16, 48), GRID).flatten(0, 1), rounded)
    assert round_activations(X[:0], GRID).shape == (0, 48)


def test_nan_stays_nan_and_infinity_is_clipped():
    rounded = round_activations(torch.tensor([float("nan"), float("inf"), float("-inf")], device=here()), GRID)
    assert rounded[0].isnan()
    torch.testing.assert_close(rounded[1:].cpu(), torch.tensor([2.0, -1.0]))


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0), (-1.0, float("inf"))], ids=str)
def test_clips_that_are_no_range_are_refused(ends):
    with pytest.raises(CheckpointError, match="expected two numbers, the first below the second"):
        InputClips.between(*ends, 4)


def normal(*shape, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_round_clipped_against_the_equations(bits):
    x, low, high, n = normal(50), -2.5, 4.0, 2**bits - 1
    s = n / (high - low)
    expected = [round((min(max(value, low), high) - low) * s) / s + low for value in x.tolist()]
    clips = torch.tensor([low, high], dtype=torch.float64)
    torch.testing.assert_close(round_clipped(x, clips, bits), torch.tensor(expected, dtype=torch.float64))
    assert len(round_clipped(normal(4000), clips, bits).unique()) == 2**bits


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_of_rounding_against_finite_differences_of_the_surrogate(bits):
    x, clips, weights = normal(40), torch.tensor([-2.5, 4.0], dtype=torch.float64), normal(40, scale=1.0).flip(0)
    n = 2**bits - 1
    v = (x.clamp(*clips) - clips[0]) * n / (clips[1] - clips[0])
    residue = v.round() - v
    assert 0 < (x > 4).sum() < 40
    assert 0 < (x < -2.5).sum() < 40

    def surrogate(x, clips):
        return (weights * (x.clamp(*clips) + residue * (clips[1] - clips[0]) / n)).sum()

    x_leaf, clips_leaf = x.clone().requires_grad_(), clips.clone().requires_grad_()
    (weights * round_clipped(x_leaf, clips_leaf, bits)).sum().backward()
    torch.testing.assert_close(x_leaf.grad, differences(lambda moved: surrogate(moved, clips), x), atol=1e-7, rtol=1e-7)
    expected = differences(lambda moved: surrogate(x, moved), clips)
    torch.testing.assert_close(clips_leaf.grad, expected, atol=1e-7, rtol=1e-7)


def test_element_that_lies_on_a_clip_moves_the_clip():
    x = torch.tensor([-4.0, 4.0, 0.1], requires_grad=True)
    clips = torch.tensor([-4.0, 4.0], requires_grad=True)
    round_clipped(x, clips, 4).backward(torch.tensor([1.0, 10.0, 0.0]))
    assert x.grad.tolist() == [0, 0, 0]
    assert clips.grad.tolist() == [1, 10]
