"""The width budget: a knapsack against an exhaustive search."""

import dataclasses
import itertools
import random

import pytest

from astro.config import Override, Quantization
from astro.errors import ConfigError
from astro.quantization.bit_allocation import Choice, allocate, choices_of, provisional_width
from astro.quantization.layer_record import LayerRecord, predicted_nats


def choices(seed, count=5, widths=(2, 3, 4, 8)):
    dice = random.Random(seed)
    return [
        Choice(f"g{i}", dice.choice([1, 2, 4]) * 1000, {b: dice.uniform(0.5, 2) * 4.0**-b for b in widths})
        for i in range(count)
    ]


def cost(items, widths):
    return sum(item.costs[widths[item.name]] for item in items)


def spent(items, widths):
    return sum(item.weights * widths[item.name] for item in items) / sum(item.weights for item in items)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("average", [2.0, 2.7, 3.5, 4.2, 8.0])
def test_against_every_allocation(seed, average):
    items = choices(seed)
    widths = allocate(items, average)
    assert spent(items, widths) <= average
    every = (dict(zip((i.name for i in items), w, strict=True)) for w in itertools.product((2, 3, 4, 8), repeat=5))
    best = min(cost(items, w) for w in every if spent(items, w) <= average)
    assert cost(items, widths) <= 1.7 * best  # greedy misses at most the last step


def test_many_groups_come_close_to_the_average():
    items = choices(0, count=200)
    assert 3.45 < spent(items, allocate(items, 3.5)) <= 3.5


def test_set_widths_stay_and_count():
    items = [*choices(1, count=20), Choice("set", 1000, {8: 0.1})]
    widths = allocate(items, 4.0)
    assert widths["set"] == 8
    assert spent(items, widths) <= 4.0
    with pytest.raises(ConfigError, match=r"average_bits: 2.0 is less than the smallest widths .* \(2\.\d+\)"):
        allocate(items, 2.0)


def test_width_that_does_not_help_is_skipped():
    assert allocate([Choice("g", 1, {2: 1.0, 3: 1.0, 4: 0.1})], 3.0) == {"g": 2}
    assert allocate([Choice("g", 1, {2: 1.0, 3: 1.0, 4: 0.1})], 4.0) == {"g": 4}


def test_measured_records_become_choices():
    settings = Quantization(bits="auto", average_bits=3.0, overrides={"*.o": Override(bits=8)})
    layer = LayerRecord(
        name="a.q+a.k", bits=3, rows=10, columns=20, group_size=4, num_tokens=1, routed_tokens=1, fallback="",
        relative_error=0.5, beta=0.0, beta_gain=0.0, width_errors={2: 0.4, 4: 0.1}, group_maximum_ratio=1.0,
        damping=0.01, factorizations=1, seconds={},
    )  # fmt: skip
    layers = [layer, dataclasses.replace(layer, name="a.o")]
    assert choices_of(layers, settings) == [Choice("a.q+a.k", 200, {2: 0.4, 4: 0.1}), Choice("a.o", 200, {8: 0.5})]


def layer_of(name, gradient_energy, **changes):
    layer = LayerRecord(
        name=name, bits=3, rows=10, columns=20, group_size=4, num_tokens=5, routed_tokens=5, fallback="",
        relative_error=0.5, beta=0.0, beta_gain=0.0, width_errors={2: 0.4, 4: 0.1}, group_maximum_ratio=1.0,
        damping=0.01, factorizations=1, seconds={}, output_energy=3.0, gradient_energy=gradient_energy,
    )  # fmt: skip
    return dataclasses.replace(layer, **changes)


def test_layers_cost_nats_where_these_are_known_of_all_whose_inputs_are():
    settings = Quantization(bits="auto", average_bits=3.0)
    experts = [layer_of(f"m.experts.{i}.{part}", 0.2) for i in range(2) for part in ("gate_proj", "down_proj")]
    experts[3] = dataclasses.replace(experts[3], num_tokens=0, fallback="rtn")
    q, together = choices_of([layer_of("a.q", 0.4), *experts], settings)
    assert q.costs == pytest.approx({2: 0.5 * 0.4 * 3 * 0.4, 4: 0.5 * 0.4 * 3 * 0.1})
    assert together.costs == pytest.approx({2: 3 * 0.3 * 0.4, 4: 3 * 0.3 * 0.1}), "their nats add up"
    assert together.weights == 800
    q, together = choices_of([layer_of("a.q", None), *experts], settings)
    assert q.costs == {2: 0.4, 4: 0.1}, "one of them is not known"
    assert together.costs == pytest.approx({2: 0.8, 4: 0.2}), "four layers of two experts"


def test_nats_of_layers_add_up_and_are_unknown_where_one_is():
    layers = [layer_of("a", 0.4), layer_of("b", 0.2), layer_of("c", None, num_tokens=0)]
    assert predicted_nats(layers) == pytest.approx(0.5 * 3 * 0.5 * (0.4 + 0.2))
    assert predicted_nats([*layers, layer_of("d", None)]) is None
    assert LayerRecord.from_json(layers[0].to_json()) == layers[0]


@pytest.mark.parametrize(("average", "expected"), [(2.0, 2), (3.4, 3), (3.5, 3), (5.9, 4), (7.0, 8)])
def test_first_round_uses_the_nearest_width(average, expected):
    assert provisional_width(Quantization(bits="auto", average_bits=average)) == expected
