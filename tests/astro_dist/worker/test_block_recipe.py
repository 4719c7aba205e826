"""Of which inputs corrections hold columns alone: of those that every reader can hold, and no more than fit."""

from types import SimpleNamespace

import pytest
import torch

from astro.activation_config import Activations, Reconstruction
from astro.config import Quantization, Regularizer
from astro.model.smoothed_tensors import Factors, SmoothedInput
from astro_dist.worker.block_recipe import block_recipe


@pytest.mark.parametrize(
    ("columns", "layers", "rank", "is_held"),
    [
        (8, ("q", "k"), 8, True),
        (9, ("q", "k"), 8, False),
        (8, ("q", "experts"), 8, False),
        (8, ("q", "k"), 7, False),
        (8, ("q", "k"), "auto", False),
    ],
)
def test_columns_are_held_where_every_reader_has_a_correction_of_that_rank(columns, layers, rank, is_held):
    spec = SimpleNamespace(
        quantization=Quantization(format="gptq"), regularization=Regularizer(), tile_elements=None,
        reconstruction=Reconstruction(rank=rank), compute_dtype=torch.float32,
        activations=Activations(bits=8, smoothing="aser", outlier_channels=8),
        checkpoint=SimpleNamespace(entries=dict.fromkeys("qk", SimpleNamespace(float_dtype=torch.float16))),
    )  # fmt: skip
    unit = SimpleNamespace(linears=[SimpleNamespace(name=name, expert=None, key=name) for name in "qk"])
    indices = tuple(range(columns))
    recipe = block_recipe(spec, unit, [SmoothedInput(layers, columns=Factors(64, indices, (0.5,) * columns))])
    assert recipe.corrections.columns == (dict.fromkeys(layers, indices) if is_held else {})
