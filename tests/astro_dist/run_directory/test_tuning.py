"""What the tuning of scales came to, of several blocks and in words."""

import json

import pytest

from astro_dist.run_directory.tuning import Tuning, TuningFigures

TUNED = [Tuning(steps=40, before=before, after=after) for before, after in ((0.5, 0.4), (0.01, 0.009), (2.0, 1.0))]
LEFT = Tuning(steps=40, before=None, after=None, reason="what the block returns is not finite")


def test_the_median_block_is_told_and_blocks_that_were_left():
    figures = TuningFigures.of([TUNED[0], None, LEFT, *TUNED[1:]])
    assert (figures.steps, figures.blocks, figures.untuned) == (40, 3, (2,))
    assert figures.fall == pytest.approx(0.2)
    assert "scales of 3 blocks were tuned in 40 steps" in figures.in_words
    assert "fell by 20.0 % in the median" in figures.in_words.replace("\u00a0", " ")
    assert figures.untuned_in_words == (
        "the scales of block 3 stay as they were solved: what the block returns is not finite"
    )
    assert TuningFigures.from_json(json.loads(json.dumps(figures.to_json()))) == figures


def test_of_many_blocks_only_some_are_named():
    figures = TuningFigures.of([LEFT] * 10)
    assert figures.in_words == ""
    assert figures.untuned_in_words.startswith("the scales of blocks 1, 2, 3, 4, 5, 6, 7, 8 and 2 more stay as")


def test_nothing_was_asked_for():
    assert TuningFigures.of([None, None]) is None
    assert TuningFigures.of([TUNED[0]]).untuned_in_words == ""
