"""Every layout keeps what it is given and says of itself what `Layout` asks."""

import pytest
import torch

from astro.config import LayerScheme, SolverSettings
from astro.errors import CheckpointError
from astro.formats import LAYOUTS
from astro.model.linear_layer import LinearLayer
from astro.quantization.grid import QuantizedLinear, fit_grid
from tests.support.models import random_weights

SCHEME = LayerScheme(group_size=32)

pytestmark = pytest.mark.parametrize("name", LAYOUTS)


def packed(layout):
    W = random_weights(32, 64)
    grid = fit_grid(W, SCHEME, SolverSettings(), torch.float16, torch.ones(64))
    linear = QuantizedLinear(grid.quantize(W), grid)
    return linear, layout.pack_linear("m.q", linear, torch.float16)


def test_packed_layers_are_read_back(name):
    layout = LAYOUTS[name]
    before, tensors = packed(layout)
    after = layout.unpack_linear("m.q", tensors, SCHEME)
    assert torch.equal(after.Q, before.Q)
    assert torch.equal(after.dequantize(), before.dequantize())


def test_tensors_have_the_endings_that_the_layout_names(name):
    layout = LAYOUTS[name]
    _, tensors = packed(layout)
    assert set(tensors) == {f"m.q.{suffix}" for suffix in layout.suffixes(SCHEME)}
    assert layout.MARK in layout.suffixes(SCHEME)


def test_config_says_what_is_packed_and_in_which_layout(name):
    layout = LAYOUTS[name]
    config = layout.quantization_config({"m.q": SCHEME}, ["lm_head"], "static")
    assert config["quant_method"] == layout.METHOD == name
    assert layout.read_schemes(config, ["m.q"]) == {"m.q": SCHEME}
    assert [layout.is_ignored(config, module) for module in ("m.q", "lm_head")] == [False, True]


def test_a_config_of_another_layout_is_refused(name):
    config = LAYOUTS[name].quantization_config({"m.q": SCHEME}, [], "static")
    with pytest.raises(CheckpointError, match="expected .*, got "):
        LAYOUTS[name].read_schemes({**config, "quant_method": "other"}, ["m.q"])


def test_usual_layers_are_stored_and_served_without_a_note(name):
    layout = LAYOUTS[name]
    assert layout.refusal(32, 64, SCHEME) is None
    assert layout.server_notes({"m.q": [SCHEME]}, []) == []
    layers = [LinearLayer.plain("m.q", "m.q.weight", 32, 64)]
    assert layout.reader_notes(layers) == []
    assert layout.inputs_refusal(layers, {"m.q": [SCHEME]}, None) is None
    assert layout.inputs_notes(layers, {"m.q": [SCHEME]}, None) == []
