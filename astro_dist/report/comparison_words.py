"""Runs beside each other, in words: the rows of the table, at a terminal and on the page."""

from collections.abc import Callable, Iterator
from pathlib import PurePath

from rich.filesize import decimal
from rich.table import Table

from astro.config import PER_CHANNEL
from astro_dist.console import compact_table, in_words
from astro_dist.evaluation.comparison import Comparison, RunFigures
from astro_dist.wording import nats, percent

__all__ = ["comparison_rows", "comparison_tables", "run_names"]

_MODEL, _ALSO_ROUNDED, _CORRECTIONS = "model", "also rounded", "corrections"
_NONE = "-"
"""The cell of a run that has nothing of what the row is about."""
_GAP = 2
"""Characters between two columns of a table, and at its two ends together."""


def run_names(comparison: Comparison) -> list[str]:
    """Return the name of each run: its folder's, or the whole path where two folders have one name.

    Args:
        comparison: Figures of the runs.
    """
    names = [PurePath(run.run).name or run.run for run in comparison.runs]
    return names if len(set(names)) == len(names) else [run.run for run in comparison.runs]


def comparison_rows(comparison: Comparison) -> Iterator[tuple[str, list[str]]]:
    """Return the title of each row, and its cells, one for each run. What no run has besides weights is no row.

    Args:
        comparison: Figures of the runs.
    """
    for title, cell in _ROWS.items():
        cells = [cell(run) for run in comparison.runs]
        if title not in (_ALSO_ROUNDED, _CORRECTIONS) or any(text != _NONE for text in cells):
            yield title, cells


def comparison_tables(comparison: Comparison, width: int) -> list[Table]:
    """Make tables of runs, one run in each column: as many tables as the terminal needs for columns that do not break.

    A model that all runs have in common is the title, and no row.

    Args:
        comparison: Figures of the runs.
        width: Number of characters of a line.
    """
    names, rows = run_names(comparison), list(comparison_rows(comparison))
    bases = {run.base for run in comparison.runs}
    common = bases.pop() if len(bases) == 1 else None
    if common is not None:
        rows = [(title, cells) for title, cells in rows if title != _MODEL]
    columns = [[name, *(cells[place] for _, cells in rows)] for place, name in enumerate(names)]
    room = width - _GAP - max(len(title) for title, _ in rows)
    parts: list[list[list[str]]] = []
    left = 0
    for column in columns:
        needed = _GAP + max(map(len, column))
        if not parts or needed > left:
            parts.append([])
            left = room
        parts[-1].append(column)
        left -= needed
    return [_table(common, ["", *(title for title, _ in rows)], part) for part in parts]


def _table(model: str | None, titles: list[str], columns: list[list[str]]) -> Table:
    """Make one table; a single column that is too long for the terminal goes on in the next line."""
    table = compact_table(model)
    table.add_column("", no_wrap=True)
    for name, *_ in columns:
        table.add_column(name, overflow="fold", justify="right")
    for title, *cells in list(zip(titles, *columns, strict=True))[1:]:
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


def _short(name: str) -> str:
    """The name of a layer from the list of blocks on, which is the same in all layers before."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[max(number - 1, 0) :])


_ROWS: dict[str, Callable[[RunFigures], str]] = {
    _MODEL: lambda run: run.base,
    "bits": lambda run: f"{run.bits:.3g}",
    "group size": lambda run: "whole rows" if run.group_size == PER_CHANNEL else str(run.group_size),
    _ALSO_ROUNDED: lambda run: run.also_rounded or _NONE,
    _CORRECTIONS: lambda run: run.corrections or _NONE,
    "mode": lambda run: run.mode,
    "size": lambda run: f"{decimal(run.size_bytes)} ({percent(run.share)})",
    "perplexity": _perplexity,
    "change": lambda run: run.perplexity.change_in_words or _NONE,
    "KL, nats a token": _divergence,
    "same first choice": lambda run: run.perplexity.agreement_in_words or _NONE,
    "time": lambda run: in_words(run.wall_s) + (", last session" if run.resumed else ""),
    "worst layer": lambda run: percent(run.worst_error, 2),
    "its name": lambda run: _short(run.worst_layer.split("+")[0]),
    "fallbacks": lambda run: str(run.fallbacks),
}
"""The rows: their titles, and the text of a cell."""
