"""Tensors with factors: exact, in their dtype, and read back from JSON."""

import json

import pytest
import torch

from astro.errors import UnsupportedError
from astro.model.linear_layer import LinearLayer
from astro.model.scaling_places import Place, Reader
from astro.model.smoothed_tensors import (
    Factors,
    SmoothedInput,
    TensorChange,
    exact_factors,
    plan_changes,
    producing_layer,
    smoothed_layer,
    smoothed_tensors,
)

POWERS = torch.tensor([1.0, 8.0, 0.25, 1.0], dtype=torch.float64)
OTHERS = torch.tensor([1.0, 3.0, 0.7, 1.0], dtype=torch.float64)
LAYERS = [LinearLayer.plain(name, f"{name}.weight", 6, 4) for name in ("b.q", "b.k")]
UP = LinearLayer.plain("b.up", "b.up.weight", 4, 5)


@pytest.mark.parametrize("dense", [POWERS, OTHERS, torch.ones(3, dtype=torch.float64)])
def test_factors_come_back_from_json(dense):
    factors = Factors.of(dense)
    assert Factors.from_json(json.loads(json.dumps(factors.to_json()))) == factors
    assert torch.equal(factors.dense, dense)
    assert factors.are_powers_of_two == (dense is not OTHERS)


def test_powers_of_two_take_a_byte_each():
    dense = torch.exp2(torch.randint(-14, 15, (9000,), generator=torch.Generator().manual_seed(0)).double())
    assert len(json.dumps(Factors.of(dense).to_json())) < 4 / 3 * 9000 + 100
    assert torch.equal(Factors.from_json(Factors.of(dense).to_json()).dense, dense)


def test_largest_factor_is_the_one_furthest_from_1():
    assert Factors.of(POWERS).largest == 8
    assert Factors.of(torch.tensor([2.0, 0.125], dtype=torch.float64)).largest == 0.125
    assert Factors.of(torch.ones(2, dtype=torch.float64)).largest == 1


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gain_in_its_dtype_is_smaller_by_exactly_its_factors(dtype, offset):
    gain = (torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5 - offset).to(dtype)
    factors = exact_factors(torch.full((64,), 8.0, dtype=torch.float64), gain, offset)
    change = TensorChange("norm", None, 0, True, offset)
    smoothed = SmoothedInput(("b.q",), "b.norm", "", (change,), Factors.of(factors), Factors.of(factors))
    after = smoothed_tensors({"norm": gain}, [smoothed], [], set())["norm"]
    assert after.dtype == dtype
    torch.testing.assert_close((after.double() + offset) * factors, gain.double() + offset, rtol=1e-12, atol=0)
    assert torch.equal(factors, torch.full_like(factors, 8.0)) == (offset == 0)


def test_dead_channels_keep_their_gain():
    assert exact_factors(POWERS, torch.zeros(4), 0.0).tolist() == [1, 1, 1, 1]


def smoothed_by(factors):
    changes = (
        *(TensorChange(layer.key, layer.name, 1, False) for layer in LAYERS),
        TensorChange(UP.key, UP.name, 0, True),
    )
    return SmoothedInput(("b.q", "b.k"), "b.up", "", changes, Factors.of(factors), Factors.of(factors))


@pytest.mark.parametrize("factors", [POWERS, OTHERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product_is_what_it_was(dtype, factors):
    generator = torch.Generator().manual_seed(2)
    tensors = {layer.key: torch.randn(layer.rows, layer.columns, generator=generator).to(dtype) for layer in LAYERS}
    tensors["b.up.weight"] = torch.randn(4, 5, generator=generator).to(dtype)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    after = smoothed_tensors(tensors, [smoothed_by(factors)], [*LAYERS, UP], {"b.q", "b.k", "b.up"})
    assert all(torch.equal(tensors[name], before[name]) for name in tensors), "what is given stays as it is"
    for layer in LAYERS:
        expected = before[layer.key].double() @ before["b.up.weight"].double()
        product = after[layer.key].double() @ after["b.up.weight"].double()
        torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)
        alone = smoothed_layer(layer.name, before[layer.key].float(), [smoothed_by(factors)])
        torch.testing.assert_close(after[layer.key].float(), alone)
    assert (after["b.q.weight"].dtype == dtype) == (
        dtype == torch.float32 or (dtype is torch.bfloat16 and factors is POWERS)
    )


def test_layer_that_stays_in_16_bits_keeps_its_dtype():
    tensors = {layer.key: torch.ones(6, 4, dtype=torch.float16) for layer in LAYERS}
    after = smoothed_tensors(tensors, [smoothed_by(POWERS)], [*LAYERS, UP], {"b.k"})
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        "b.q.weight": torch.float16, "b.k.weight": torch.float32,
    }  # fmt: skip


def place(rows, weight="up.weight"):
    return Place("up", torch.tensor(rows), 8, {}, Reader(weight, 0), (), (Reader("q.weight", 1),))


def test_layer_is_found_that_makes_the_channels():
    gate, up = (
        LinearLayer(f"b.{name}", "b.both", 4, 5, f"b.{name}", "b.both", expert=2, first=first, step=2)
        for name, first in (("gate", 0), ("up", 1))
    )
    made_by = producing_layer(place([1, 3, 5, 7], "both"), "b.", [gate, up], expert=2)
    assert made_by[0] == up
    assert made_by[1].tolist() == [0, 1, 2, 3]
    assert producing_layer(place([1, 2], "both"), "b.", [gate, up], expert=2) is None
    assert producing_layer(place([1, 3], "both"), "b.", [gate, up], expert=1) is None


def test_parameter_that_the_checkpoint_holds_otherwise_is_refused():
    norm = Place("norm", torch.arange(4), 4, {"norm.weight": 0.0}, None, (), (Reader("q.weight", 1),))
    assert [change.key for change in plan_changes(norm, "b.", LAYERS, {"b.norm.weight": "n"})] == ["b.q.weight", "n"]
    with pytest.raises(UnsupportedError, match=r"norm\.weight has no tensor of its own"):
        plan_changes(norm, "b.", LAYERS, {})
    with pytest.raises(UnsupportedError, match="no layer of its own"):
        plan_changes(place([0, 1]), "b.", LAYERS, {})
