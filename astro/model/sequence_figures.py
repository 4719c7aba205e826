"""Figures of a text by sequence, and what follows from them: means and changes with their standard errors."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

__all__ = ["SequenceFigures", "Significant", "mean_per_token", "relative_change"]


@dataclasses.dataclass(frozen=True)
class SequenceFigures:
    """What a model predicted of one sequence. Every token of its text is predicted from those before it.

    The tokens that a tokenizer puts in front are no text, so that no prediction of them counts. Where it puts none, the
    first token of the text has nothing before it and is not predicted.

    Attributes:
        tokens: Number of tokens that were predicted.
        loss: Negative log-likelihood of the tokens in nats, summed.
        divergence: KL divergence of the model's distribution from the source model's in nats, summed over tokens; 0
            for the source model itself.
        agreements: Number of tokens at which both models find the same token most likely.
    """

    tokens: int
    loss: float
    divergence: float
    agreements: int


@dataclasses.dataclass(frozen=True)
class Significant:
    """A figure and its standard error.

    Attributes:
        value: The figure.
        error: Standard error of the figure over the sequences; None for a single sequence.
    """

    value: float
    error: float | None


def relative_change(before: Sequence[float], after: Sequence[float], tokens: Sequence[int]) -> Significant:
    """Return the relative change of a perplexity, with its standard error over the sequences.

    Both models saw the same sequences, so that the error is that of the differences, which is much smaller than that
    of either perplexity.

    Args:
        before: Loss of each sequence before, in nats.
        after: Loss of each sequence after, in nats.
        tokens: Number of tokens of each sequence.
    """
    change = mean_per_token([b - a for a, b in zip(before, after, strict=True)], tokens)
    factor = math.exp(min(change.value, 700.0))  # near the largest float
    return Significant(factor - 1, None if change.error is None else change.error * factor)


def mean_per_token(sums: Sequence[float], tokens: Sequence[int]) -> Significant:
    """Return the mean of a figure over all tokens, with its standard error over the sequences.

    Tokens of one sequence are no independent samples, sequences are.

    Args:
        sums: Sum of the figure over the tokens of each sequence.
        tokens: Number of tokens of each sequence.
    """
    mean = math.fsum(sums) / sum(tokens)
    number = len(sums)
    if number < 2:
        return Significant(mean, None)
    # The error of a ratio of two sums, to first order.
    mean_count = sum(tokens) / number
    residuals = [(value - mean * count) / mean_count for value, count in zip(sums, tokens, strict=True)]
    return Significant(mean, statistics.stdev(residuals) / math.sqrt(number))
