"""Runs beside each other, in words: the rows of the table, at a terminal and on the page."""

from collections.abc import Callable, Iterator
from pathlib import PurePath

from rich.filesize import decimal
from rich.table import Table

from astro_dist.console import in_words
from astro_dist.evaluation.comparison import Comparison, RunFigures
from astro_dist.wording import nats, percent

__all__ = ["comparison_rows", "comparison_table", "run_names"]


def run_names(comparison: Comparison) -> list[str]:
    """Return the name of each run: its folder's, or the whole path where two folders have one name.

    Args:
        comparison: Figures of the runs.
    """
    names = [PurePath(run.run).name or run.run for run in comparison.runs]
    return names if len(set(names)) == len(names) else [run.run for run in comparison.runs]


def comparison_rows(comparison: Comparison) -> Iterator[tuple[str, list[str]]]:
    """Return the title of each row, and its cells, one for each run.

    Args:
        comparison: Figures of the runs.
    """
    for title, cell in _ROWS.items():
        yield title, [cell(run) for run in comparison.runs]


def comparison_table(comparison: Comparison) -> Table:
    """Make the table of runs, one in each column. What is too long for the terminal goes on in the next line.

    Args:
        comparison: Figures of the runs.
    """
    table = Table()
    table.add_column("", no_wrap=True)
    for name in run_names(comparison):
        table.add_column(name, overflow="fold")
    for title, cells in comparison_rows(comparison):
        table.add_row(title, *cells)
    return table


def _perplexity(run: RunFigures) -> str:
    measured = run.perplexity
    if measured.quantized is None or measured.original is None:
        return "not measured"
    return f"{measured.original:.2f} → {measured.quantized:.2f}"


def _divergence(run: RunFigures) -> str:
    value, error = run.perplexity.divergence, run.perplexity.divergence_error
    if value is None:
        return "not measured"
    return f"{nats(value)}{'' if error is None else f' ± {nats(error)}'}"


_ROWS: dict[str, Callable[[RunFigures], str]] = {
    "model": lambda run: run.base,
    "bits": lambda run: f"{run.bits:.3g}",
    "group size": lambda run: "rows" if run.group_size == -1 else str(run.group_size),
    "mode": lambda run: run.mode,
    "size": lambda run: f"{decimal(run.size_bytes)} ({percent(run.share)})",
    "perplexity": _perplexity,
    "change": lambda run: run.perplexity.change_in_words or "-",
    "KL, nats a token": _divergence,
    "same first choice": lambda run: "-" if run.perplexity.agreement is None else percent(run.perplexity.agreement, 1),
    "time": lambda run: in_words(run.wall_s) + (", last session" if run.resumed else ""),
    "worst layer": lambda run: f"{percent(run.worst_error, 2)}: {run.worst_layer.split('+')[0]}",
    "fallbacks": lambda run: str(run.fallbacks),
}
"""The rows: their titles, and the text of a cell."""
