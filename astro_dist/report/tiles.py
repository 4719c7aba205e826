"""The headline of a report, and the four tiles below it: quality, size, bits and time."""

import dataclasses

from rich.filesize import decimal

from astro_dist.console import in_words
from astro_dist.report.findings import Findings
from astro_dist.run_directory.summary import Perplexity, Summary
from astro_dist.wording import counted, group_size_in_words, nats, percent

__all__ = ["Figure", "Tile", "headline", "tiles"]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A large figure and what belongs to it.

    Attributes:
        value: Figure itself.
        unit: What stands behind it in small letters: its unit or its error.
        detail: Line below it.
    """

    value: str
    unit: str = ""
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile shows one or two figures.

    Attributes:
        title: What is measured.
        figures: Figures.
    """

    title: str
    figures: tuple[Figure, ...]


def headline(findings: Findings) -> list[str]:
    """Say in a few words each what was asked for: bits, group size, inputs, format and mode.

    Args:
        findings: What the run directory says.
    """
    config = findings.config
    if config is None:
        return []
    q, execution = config.quantization, config.execution
    bits = f"{q.average_bits:g} bits on average" if q.bits == "auto" else f"{q.bits} bits"
    group, mode = group_size_in_words(q.group_size), f"mode {execution.mode}"
    rounds = [counted(execution.rounds, "round")] if execution.rounds > 1 else []
    return [bits, group, *config.activations.rounded_in_words, q.format, ", ".join([mode, *rounds])]


def tiles(findings: Findings) -> list[Tile]:
    """Make the tiles of a finished run; none for other runs.

    Args:
        findings: What the run directory says.
    """
    summary = findings.summary
    if summary is None:
        return []
    return [_quality(summary.perplexity), _size(summary), _bits(findings, summary), _time(summary)]


def _quality(measured: Perplexity) -> Tile:
    title = "Quality on held-out text"
    if measured.original is None or measured.quantized is None:
        return Tile(title, (Figure("not measured", detail="the run held out no text"),))
    figures = []
    if measured.divergence is not None:
        error = "" if measured.divergence_error is None else f"± {nats(measured.divergence_error)}"
        agreement = measured.agreement_in_words and f"; same first choice at {_unbroken(measured.agreement_in_words)}"
        detail = f"nats a token, KL divergence{agreement}"
        figures.append(Figure(nats(measured.divergence), error, detail))
    change = measured.change_in_words or percent(measured.quantized / measured.original - 1, 1, signed=True)
    value, _, error = change.partition(" ± ")
    detail = f"perplexity, {_unbroken(f'{measured.original:.3f} → {measured.quantized:.3f}')}"
    detail += measured.sample_in_words and f"; {measured.sample_in_words}"
    figures.append(Figure(value, f"± {error}" if error else "", detail))
    return Tile(title, tuple(figures))


def _size(summary: Summary) -> Tile:
    value, _, unit = decimal(summary.total_bytes).partition(" ")
    share = percent(summary.total_bytes / summary.bytes_read)
    detail = f"{share} of the original, {_unbroken(decimal(summary.bytes_read))}"
    if summary.corrections is not None:
        detail += f"; {_unbroken(decimal(summary.corrections.size_bytes))} of it are corrections"
    return Tile("Size", (Figure(value, unit, detail),))


def _bits(findings: Findings, summary: Summary) -> Tile:
    widths = findings.weights_by_width
    total = sum(widths.values())
    if len(widths) > 1:
        detail = ", ".join(_unbroken(f"{bits} bits: {percent(count / total)}") for bits, count in widths.items())
    else:
        detail = "every quantized weight, without its scales"
    return Tile("Average of a weight", (Figure(f"{summary.average_bits:.3g}", "bits", detail),))


def _time(summary: Summary) -> Tile:
    value, _, unit = in_words(summary.wall_s).partition(" ")
    workers = sum(name.startswith("worker") for name in summary.peak_rss_bytes)
    details = [counted(workers, "worker")] if workers else []
    details.append(f"{in_words(sum(summary.phases_s.values()))} of all workers together")
    if summary.resumed_units:
        details.append(f"last session, {counted(summary.resumed_units, 'unit')} before it")
    return Tile("Time", (Figure(value, unit, ", ".join(details)),))


def _unbroken(text: str) -> str:
    """Keep a text on one line."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")
