"""People read of blocks, not of names of files."""

import pytest

from astro_dist.schedule.calls import (
    Backward,
    CopyTensors,
    DifferentiateLoss,
    Embed,
    EvaluateLoss,
    MeasureChannels,
    SolveBlock,
)
from astro_dist.schedule.names import evaluate_unit, sequential_units, smoothing_unit, unit_names, weights_unit
from astro_dist.schedule.unit_words import UnitWords


@pytest.mark.parametrize(
    ("unit", "words"),
    [
        (SolveBlock(0, 3).unit, "block 4 of 30"),
        (Embed().unit, "embedding"),
        (CopyTensors(1).unit, "copying other tensors, part 2"),
        (Backward(11, "c0000").unit, "token weights of block 12 of 30"),
        (MeasureChannels(2, "c0000").unit, "smoothing of block 3 of 30"),
        (DifferentiateLoss("c0000").unit, "gradient of the loss"),
        (EvaluateLoss("original").unit, "perplexity of the original"),
        (EvaluateLoss("round-0").unit, "perplexity of the result"),
        (evaluate_unit(0), "evaluation of block 1 of 30"),
        ("start", "start"),
    ],
)
def test_a_unit_has_words(unit, words):
    assert UnitWords(30).unit(unit) == words


def test_rounds_are_named_where_there_are_several():
    assert UnitWords(30, 2).unit(SolveBlock(1, 3).unit) == "round 2, block 4 of 30"
    assert UnitWords(30, 2).unit(EvaluateLoss("round-1").unit) == "perplexity after round 2"
    assert UnitWords(0).unit(SolveBlock(1, 3).unit) == "block 4"


def test_no_unit_is_without_words():
    units = {*unit_names(3, 2, 2, True), *sequential_units(3, 2, True), *map(weights_unit, range(3))}
    units |= set(map(smoothing_unit, range(3)))
    words = {unit: UnitWords(3, 2).unit(unit) for unit in units}
    assert not {unit for unit, said in words.items() if said == unit and unit != "embed"}
    assert len(set(words.values())) == len(units)
