"""How many sequences come from each calibration text."""

import dataclasses
import math
from collections.abc import Sequence

from astro.errors import ConfigError

__all__ = ["Demand", "apportion", "settle"]


@dataclasses.dataclass(frozen=True)
class Demand:
    """A demand is how many sequences are asked for, to calibrate on or held out.

    Attributes:
        option: Key of the configuration, `samples` or `holdout_samples`.
        count: Number of sequences, or the most where the text decides.
        least: Number of sequences below which the text is too short, where it decides.
        is_auto: Whether fewer will do where the text is short.
        part: Part of the text that is for them, in words.
        length: Length of a sequence in tokens.
    """

    option: str
    count: int
    least: int
    is_auto: bool
    part: str
    length: int


def apportion(count: int, shares: Sequence[float]) -> list[int]:
    """Divide a number of sequences by shares, so that no text is more than one sequence from its share.

    Args:
        count: Number of sequences.
        shares: Share of each text; they add up to about 1.
    """
    total = sum(shares)
    exact = [count * share / total for share in shares]
    counts = [math.floor(value) for value in exact]
    # What is left goes to the texts that lost most by rounding down, the first of them where several lost the same.
    by_loss = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_loss[: count - sum(counts)]:
        counts[i] += 1
    return counts


def settle(demand: Demand, names: Sequence[str], shares: Sequence[float], available: Sequence[int]) -> list[int]:
    """Decide how many sequences come from each text. Where texts are short, all give fewer, so that the shares hold.

    Args:
        demand: What is asked for.
        names: Name of each text in the configuration.
        shares: Share of each text.
        available: Number of sequences that each text has.

    Raises:
        ConfigError: A text has too few.
    """
    counts = apportion(demand.count, shares)
    short = [i for i, count in enumerate(counts) if count > available[i]]
    if not short:
        return counts
    option, length = f"calibration.{demand.option}", f"{demand.length} tokens"
    if not demand.is_auto:
        first = short[0]
        of_text = f", {counts[first]} of them from {names[first]}" if len(names) > 1 else ""
        raise ConfigError(
            f"{option}: {demand.count} sequences of {length} asked for{of_text}, but the text of {names[first]} gives "
            f"{available[first]} ({demand.part} of it, so much is for that); use more text, fewer samples or shorter "
            "sequences"
        )
    fitting = (apportion(count, shares) for count in range(demand.count, -1, -1))
    counts = next(c for c in fitting if all(map(int.__le__, c, available)))
    if sum(counts) < demand.least:
        shortest = min(short, key=lambda i: available[i] / shares[i])
        raise ConfigError(
            f"{option}: the text of {names[shortest]} gives {available[shortest]} sequences of {length} ({demand.part} "
            f"of it, so much is for that), and with fewer than {demand.least} in all a run begins only if you set "
            f"{option} yourself; use more text or shorter sequences"
        )
    return counts
