"""A result is judged by a plain rule, and not at all where too few tokens were measured."""

import pytest

from astro_dist.report.verdict import GRADES, verdict_on
from astro_dist.run_directory.summary import Perplexity

MEASURED = {
    "original": 10.0, "quantized": 10.05, "tokens": 16352, "change": 0.005, "change_error": 0.001,
    "divergence": 0.008, "divergence_error": 0.0005, "agreement": 0.95,
}  # fmt: skip


def verdict(**changes):
    return verdict_on(Perplexity(**{**MEASURED, **changes}))


@pytest.mark.parametrize(
    ("divergence", "change", "grade"),
    [
        (0.01, 0.01, 0), (0.011, 0.0, 1), (0.01, 0.011, 1), (0.09, 0.06, 2), (0.01, 0.3, 3), (1.1, 0.0, 4),
        (float("nan"), 0.0, 4), (0.01, float("inf"), 4), (0.009, -0.02, 0),
    ],
)  # fmt: skip
def test_the_worse_of_both_figures_decides(divergence, change, grade):
    assert verdict(divergence=divergence, change=change).grade == grade


def test_grades_fall_in_order():
    limits = [(grade.most_divergence, grade.most_change) for grade in GRADES]
    assert limits == sorted(limits)
    assert limits[-1] == (float("inf"), float("inf"))


@pytest.mark.parametrize(
    "changes", [{"tokens": 999}, {"divergence_error": None}, {"divergence": 0.002, "divergence_error": 0.0011}]
)
def test_few_tokens_are_not_judged(changes):
    judged = verdict(**changes)
    assert (judged.grade, judged.title) == (None, "Too few tokens to judge")


def test_no_text_was_held_out():
    assert verdict_on(Perplexity(None, None)).title == "Not measured"


def test_verdict_in_words():
    assert verdict().in_words == (
        "Very close to the original (KL divergence 0.008, perplexity +0.5 %, 16,352 tokens): on this kind of text you "
        "will hardly notice a difference."
    )
