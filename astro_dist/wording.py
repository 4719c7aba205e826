"""How shares, counts and sentences are written, on every page, card and line of this package."""

from astro.config import PER_CHANNEL

__all__ = ["counted", "group_size_in_words", "nats", "percent", "sentence"]


def percent(share: float, digits: int | None = None, signed: bool = False) -> str:
    """Write a share as a percentage, such as "42 %".

    Args:
        share: Share to write, where 1 is all of it.
        digits: Number of decimal places; None for none, but one where it is nearly all or nearly nothing, such as
            "99.5 %" or "under 0.1 %".
        signed: Whether a plus sign is written too.
    """
    exact = 100 * share
    if digits is None:
        if 0 < exact < 0.05 or 99.95 <= exact < 100:
            return "under 0.1 %" if exact < 1 else "over 99.9 %"
        digits = 0 if 1 <= abs(exact) < 99 or abs(exact) in (0, 100) else 1
    exact = round(exact, digits) + 0.0  # no zero has a sign
    return f"{exact:{'+' if signed and exact else ''}.{digits}f} %"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Write a number and what it counts, such as "1 round" or "2 rounds".

    Args:
        number: Number to write.
        noun: Word for one of them.
        plural: Word for several; None where it is the word for one with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def group_size_in_words(group_size: int) -> str:
    """Say which columns of a row share a scale, such as "group size 128" or "one scale a row".

    Args:
        group_size: Number of columns that share a scale; -1 for whole rows.
    """
    return "one scale a row" if group_size == PER_CHANNEL else f"group size {group_size}"


def sentence(words: str) -> str:
    """Let words begin with a capital; the rest stays as it is, names above all.

    Args:
        words: The words, not empty.
    """
    return f"{words[0].upper()}{words[1:]}"


def nats(divergence: float) -> str:
    """Write a KL divergence with four decimal places, or with an exponent where those would say too little.

    Args:
        divergence: KL divergence in nats a token.
    """
    return f"{divergence:.4f}" if divergence == 0 or abs(divergence) >= 1e-3 else f"{divergence:.1e}"
