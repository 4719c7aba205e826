"""The heat map shows every kind of layer, with a median and a largest row where a block has several."""

import dataclasses

from astro.quantization.layer_record import LayerRecord
from astro_dist.report.heat_map import LEVELS, heat_map

LAYER = LayerRecord(
    name="x", bits=4, rows=8, columns=8, group_size=8, num_tokens=8, routed_tokens=8, fallback="", relative_error=0.01,
    beta=0.0, beta_gain=0.0, width_errors={}, group_maximum_ratio=1.0, damping=0.01, factorizations=1, seconds={},
)  # fmt: skip


def layer(name, error):
    return dataclasses.replace(LAYER, name=name, relative_error=error)


def test_errors_take_colours_by_their_logarithm():
    blocks = {block: [layer(f"l.{block}.up", 10.0**-block)] for block in range(4)}
    (strip,) = heat_map(blocks).strips
    levels = [cell.level for cell in strip.cells]
    assert levels == sorted(levels, reverse=True)
    assert (levels[0], levels[-1]) == (LEVELS - 1, 0)
    assert levels[1] - levels[2] == 3  # a third of the way each


def test_layers_that_are_much_alike_look_alike():
    blocks = {block: [layer(f"l.{block}.up", 0.01 + 1e-4 * block)] for block in range(4)}
    assert {cell.level for cell in heat_map(blocks).strips[0].cells} == {LEVELS - 1}


def test_single_small_errors_do_not_darken_the_others():
    errors = [1e-9, *[0.001] * 20, *[0.01] * 20]
    blocks = {block: [layer(f"l.{block}.up", error)] for block, error in enumerate(errors)}
    assert [cell.level for cell in heat_map(blocks).strips[0].cells] == [0, *[0] * 20, *[LEVELS - 1] * 20]


def test_experts_have_a_median_and_a_largest_row():
    experts = [layer(f"l.0.mlp.experts.{e}.up", error) for e, error in enumerate((0.01, 0.02, 0.3))]
    median, largest = heat_map({0: experts}).strips
    assert (median.label, largest.label) == (
        "experts: up, median of each block", "experts: up, largest of each block",
    )  # fmt: skip
    assert median.cells[0].title == "block 0, experts: up, median of each block: 0.02; 3 from 0.01 to 0.3"
    assert largest.cells[0].level == LEVELS - 1 > median.cells[0].level


def test_a_kind_that_a_block_lacks_has_no_cell_there():
    strips = heat_map({0: [layer("l.0.up", 0.1)], 1: [layer("l.1.o", 0.1)], 2: [layer("l.2.up", 0.0)]}).strips
    assert {strip.label: [cell.block for cell in strip.cells] for strip in strips} == {"up": [0, 2], "o": [1]}


def test_errors_that_are_no_numbers_have_a_colour():
    errors = (float("nan"), float("inf"), 0.1)
    (strip,) = heat_map({block: [layer(f"l.{block}.up", error)] for block, error in enumerate(errors)}).strips
    assert [cell.level for cell in strip.cells] == [0, LEVELS - 1, LEVELS - 1]


def test_no_layer():
    assert heat_map({}) is None
