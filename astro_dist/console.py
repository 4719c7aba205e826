"""What is said on a console: lines with the time, and how long something takes in words."""

import contextlib
import logging
import time
from collections.abc import Iterator

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

__all__ = ["compact_table", "in_words", "say", "show_log", "show_log_by_default", "waiting_for"]

_spinning: list[Console] = []
"""The console on which a spinner turns, if one does: lines printed through another one would end up beside it."""


def in_words(seconds: float) -> str:
    """Say a time in the largest unit of which it makes two.

    Args:
        seconds: Time in seconds.
    """
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def compact_table(title: str | None = None) -> Table:
    """Return a table without columns that is as narrow as it can be, for terminals of 80 characters.

    Args:
        title: Line above the table; None for none.
    """
    return Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, collapse_padding=True)


def say(text: str, console: Console | None = None) -> None:
    """Print one line that stays, with the time.

    Args:
        text: Line to print.
        console: Console that shows a live display; standard error, above a spinner if one turns there, for None.
    """
    console = console or (_spinning[-1] if _spinning else Console(stderr=True))
    console.print(f"[{time.strftime('%H:%M:%S')}] {text}", markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Turn a spinner on a terminal while something takes a while; elsewhere nothing is shown.

    Args:
        what: What is waited for.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        _spinning.append(console)
        try:
            yield
        finally:
            _spinning.pop()


def show_log() -> None:
    """Show on the console what this library logs, from now on; asked again, nothing changes."""
    logger = logging.getLogger("astro_dist")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())


def show_log_by_default() -> None:
    """Show on the console what this library logs, unless the program has decided where its logs go."""
    if not logging.getLogger("astro_dist").hasHandlers():
        show_log()


class _ConsoleHandler(logging.Handler):
    """Prints each record as one line."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))
