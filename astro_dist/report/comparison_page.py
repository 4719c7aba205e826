"""Runs beside each other as one HTML page, which has no script and loads nothing."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from rich.filesize import decimal

import astro
from astro.storage.atomic import write_text
from astro_dist.console import in_words
from astro_dist.evaluation.comparison import Comparison, RunFigures
from astro_dist.report.comparison_words import comparison_rows, run_names
from astro_dist.report.html import TEMPLATES
from astro_dist.report.layer_bars import Bar
from astro_dist.wording import nats, percent

__all__ = ["write_comparison"]


@dataclasses.dataclass(frozen=True)
class _Chart:
    """A chart shows one figure of every run.

    Attributes:
        title: Title of the chart.
        note: What the figure is.
        bars: Bars of the runs that have the figure.
    """

    title: str
    note: str
    bars: tuple[Bar, ...]


_CHARTS: tuple[tuple[str, str, Callable[[RunFigures], float | None], Callable[[float], str]], ...] = (
    (
        "Change of perplexity",
        "On the held-out text, relative to the original.",
        lambda run: run.perplexity.change,
        lambda value: percent(value, 2, signed=True),
    ),
    (
        "KL divergence from the original",
        "On the held-out text, in nats a token.",
        lambda run: run.perplexity.divergence,
        nats,
    ),
    (
        "Size",
        "Of all weights, in files.",
        lambda run: run.size_bytes,
        lambda value: decimal(int(value)),
    ),
    (
        "Largest output error of a layer",
        "Relative to the layer's output on the calibration text.",
        lambda run: run.worst_error,
        lambda value: percent(value, 2),
    ),
    (
        "Time",
        "Of the last session.",
        lambda run: run.wall_s,
        in_words,
    ),
)


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page.

    Args:
        comparison: Figures of the runs.
        path: Path of the page.

    Raises:
        StorageError: The page cannot be written.
    """
    names = run_names(comparison)
    charts = []
    for title, note, figure, words in _CHARTS:
        values = {name: figure(run) for name, run in zip(names, comparison.runs, strict=True)}
        known = {name: value for name, value in values.items() if value is not None}
        most = max(map(abs, known.values()), default=0.0) or 1.0
        bars = (Bar(name, name, abs(value) / most, words(value), "") for name, value in known.items())
        if known:
            charts.append(_Chart(title, note, tuple(bars)))
    page = TEMPLATES.get_template("comparison.html.j2").render(
        names=names, rows=list(comparison_rows(comparison)), charts=charts, notes=comparison.notes,
        version=astro.__version__,
    )  # fmt: skip
    write_text(path, page)
