"""The fixed grid between learned clips, in the two numbers that files tell, against training's own rounding."""

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
