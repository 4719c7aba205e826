"""The verdict on a result: what its figures on the held-out text mean, by a plain rule."""

import dataclasses
import math

from astro_dist.run_directory.summary import ENOUGH_TOKENS, Perplexity
from astro_dist.wording import percent

__all__ = ["GRADES", "Grade", "Verdict", "verdict_on"]


@dataclasses.dataclass(frozen=True)
class Grade:
    """A grade is given where neither figure is larger than its limit; the first that fits is taken.

    Attributes:
        most_divergence: Largest KL divergence, in nats a token.
        most_change: Largest relative change of the perplexity.
        title: Name of the grade.
        advice: What to do about it.
    """

    most_divergence: float
    most_change: float
    title: str
    advice: str


GRADES = (
    Grade(0.01, 0.01, "Very close to the original", "on this kind of text you will hardly notice a difference"),
    Grade(0.05, 0.04, "A small loss", "usual for good 4-bit weights; try your own tasks, then use it"),
    Grade(0.2, 0.15, "A loss that one can notice", "compare it with the original on your own tasks before you use it"),
    Grade(
        most_divergence=1.0,
        most_change=1.0,
        title="A heavy loss",
        advice="more bits, mode stages instead of blocks, or sequential, corrections of low rank, and, where inputs "
        "stay in 16 bits, smaller groups lose less; size must be worth it",
    ),
    Grade(math.inf, math.inf, "Ruined", "it is hardly a language model any more; look at the largest layer errors"),
)
"""The grades, the best first. The limits are our own, from what good and bad results of other models look like."""
_MOST_DOUBT = 0.5
"""Standard error of the KL divergence, as a share of it, above which the sample is too small to judge by."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Says whether to use a result.

    Attributes:
        grade: Place of the grade in `GRADES`, from 0; None where the result cannot be judged.
        title: Name of the grade, or why there is none.
        advice: What to do about it.
        reason: Figures that the grade follows from; empty where there are none.
    """

    grade: int | None
    title: str
    advice: str
    reason: str = ""

    @property
    def in_words(self) -> str:
        """Return the verdict as one sentence."""
        return f"{self.title}{f' ({self.reason})' if self.reason else ''}: {self.advice}."


def verdict_on(measured: Perplexity) -> Verdict:
    """Judge a result by what was measured on the held-out text.

    Args:
        measured: Figures of both models.
    """
    change = measured.change
    if change is None and measured.original and measured.quantized:
        change = measured.quantized / measured.original - 1
    if change is None:
        advice = "calibration.holdout_samples is 0; hold out some text, or test the model on your own tasks"
        return Verdict(None, "Not measured", advice)
    if _is_too_small(measured):
        advice = f"raise calibration.holdout_samples; {ENOUGH_TOKENS:,} tokens of several sequences are the least"
        return Verdict(None, "Too few tokens to judge", advice, measured.tokens_in_words)
    divergence = measured.divergence
    fits = [(divergence or 0.0) <= grade.most_divergence and change <= grade.most_change for grade in GRADES]
    place = fits.index(True) if True in fits else len(GRADES) - 1  # a figure that is no number fits none
    figures = [f"perplexity {percent(change, 1, signed=True)}", measured.tokens_in_words]
    if divergence is not None:
        figures.insert(0, f"KL divergence {divergence:.3g}")
    return Verdict(place, GRADES[place].title, GRADES[place].advice, ", ".join(filter(None, figures)))


def _is_too_small(measured: Perplexity) -> bool:
    if measured.tokens is None:  # versions that did not count them
        return False
    divergence, error = measured.divergence, measured.divergence_error
    uncertain = divergence is not None and (error is None or error > _MOST_DOUBT * divergence)
    return measured.tokens < ENOUGH_TOKENS or uncertain
