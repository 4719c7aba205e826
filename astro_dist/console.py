"""What is said on a console: lines with the time, and how long something takes in words."""

import time

from rich.console import Console

__all__ = ["in_words", "say"]


def in_words(seconds: float) -> str:
    """Seconds in the largest unit of which they make two."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def say(text: str, console: Console | None = None) -> None:
    """One line that stays, with the time; on a console that shows a live display where one is given."""
    console = console or Console(stderr=True)
    console.print(f"[{time.strftime('%H:%M:%S')}] {text}", markup=False, highlight=False, soft_wrap=True)
