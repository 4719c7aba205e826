"""How long something takes, in words."""

__all__ = ["in_words"]


def in_words(seconds: float) -> str:
    """Seconds in the largest unit of which they make two."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
