"""The report of a run as one HTML page and one table. It is made from records alone, so a run may still go on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pyarrow
import pyarrow.parquet
from rich.filesize import decimal

from astro.errors import DamagedError
from astro.quantization.layer_record import LayerRecord
from astro.storage.atomic import write_atomic, write_text
from astro_dist.report.error_chart import error_chart
from astro_dist.report.status import read_status
from astro_dist.run_directory.identity import read_identity
from astro_dist.run_directory.journal import Damaged, Event, Failed, PublishFailed, UploadFailed
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.summary import Summary, read_summary

__all__ = ["write_report"]

_WORST = 10
"""The number of layers with the largest errors that the page names."""
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("astro_dist", "report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

Row = tuple[str, ...]
"""The cells of a row of a table on the page."""


def write_report(root: Path) -> Path:
    """Write `report/index.html` and `report/layers.parquet` into a run directory.

    Args:
        root: Folder of the run directory.

    Returns:
        The path of the page.

    Raises:
        ConfigError: The folder holds no run.
        StorageError: The run directory cannot be written.
    """
    status = read_status(root)
    run = RunDirectory(root, read_identity(root).key)
    blocks = run.blocks()
    rows = [_row(*place, layer) for place, block in blocks.items() for layer in block.layers]
    if rows:
        table = pyarrow.Table.from_pylist(rows)
        write_atomic(run.report / "layers.parquet", lambda partial: pyarrow.parquet.write_table(table, partial))
    newest = max((number for number, _ in blocks), default=0)
    last = {index: block.layers for (number, index), block in blocks.items() if number == newest}
    layers = [layer for members in last.values() for layer in members]
    page = _TEMPLATES.get_template("report.html.j2").render(
        name=root.name,
        status=status,
        figures=_figures(run),
        raised=[(layer.name, f"{layer.damping:g}") for layer in layers if layer.factorizations > 1],
        starved=[(layer.name, str(layer.routed_tokens), layer.fallback) for layer in layers if layer.fallback],
        failed=[row for row in map(_failure, run.journal.events()) if row],
        chart=error_chart(last) if layers else None,
        worst=_worst(layers),
        costly=_costly(layers),
        config=run.config.read_text(encoding="utf-8"),
    )
    write_text(run.report / "index.html", page)
    return run.report / "index.html"


def _row(round_index: int, block: int, layer: LayerRecord) -> dict[str, Any]:
    """A row of the table, for layers that were solved together."""
    plain = dataclasses.asdict(layer)
    del plain["width_errors"]
    nats = {"predicted_nats": layer.predicted_nats}
    return {"round": round_index, "block": block, **plain, **nats, "seconds": sum(layer.seconds.values())}


def _worst(layers: Sequence[LayerRecord]) -> list[Row]:
    largest = sorted(layers, key=lambda layer: -layer.relative_error)[:_WORST]
    return [
        (
            layer.name,
            str(layer.bits),
            f"{layer.relative_error:.3g}",
            f"{layer.beta:g}",
            f"{layer.beta_gain:.1%}",
        )
        for layer in largest
    ]


def _costly(layers: Sequence[LayerRecord]) -> list[Row]:
    """Rows with the layers that are predicted to cost most; none where that is not known."""
    nats = {layer.name: layer.predicted_nats or 0.0 for layer in layers}
    total = sum(nats.values())
    most = sorted(layers, key=lambda layer: -nats[layer.name])[:_WORST]
    return [
        (layer.name, str(layer.bits), f"{nats[layer.name]:.3g}", f"{nats[layer.name] / total:.1%}")
        for layer in most
        if nats[layer.name] > 0
    ]


def _failure(event: Event) -> Row | None:
    """A row for what failed or was found damaged; None for other events."""
    if isinstance(event, Failed):
        return event.unit, event.kind, event.cause
    if isinstance(event, Damaged):
        return event.unit, event.NAME, event.reason
    if isinstance(event, UploadFailed | PublishFailed):
        return getattr(event, "unit", ""), event.NAME, event.cause
    return None


def _figures(run: RunDirectory) -> list[Row]:
    """Rows with the figures of a finished run; none while it is not finished, or where the summary cannot be read."""
    try:
        summary = read_summary(run.summary)
    except DamagedError:
        return []
    rows: list[Row] = [
        *_perplexities(summary),
        *([("predicted", summary.prediction_in_words)] if summary.prediction_in_words else []),
        ("average width of quantized weights", f"{summary.average_bits:.2f} bits"),
        *([("widths chosen by", summary.widths_by)] if summary.widths_by else []),
        ("read, written", f"{decimal(summary.bytes_read)}, {decimal(summary.bytes_written)}"),
        ("seconds of the last session", f"{summary.wall_s:.0f}"),
        (
            "strengths β and how many layers solved together took them",
            ", ".join(f"{beta}: {count}" for beta, count in summary.betas.items()),
        ),
        ("seconds of all workers by phase", ", ".join(f"{name} {s:.0f}" for name, s in summary.phases_s.items())),
        ("peak resident memory", ", ".join(f"{name} {decimal(n)}" for name, n in summary.peak_rss_bytes.items())),
    ]
    if summary.publish is not None:
        place = summary.publish
        rows.append(("published", f"{place.url}, commit {place.commit}, {place.num_files} files"))
    return [*rows, *(("note", note) for note in summary.notes)]


def _perplexities(summary: Summary) -> list[Row]:
    if summary.perplexity.original is None:
        return []
    rows: list[Row] = [("perplexity of the original", f"{summary.perplexity.original:.3f}")]
    for number, figures in enumerate(summary.rounds):
        label = "perplexity of the result" if len(summary.rounds) == 1 else f"perplexity of round {number}"
        rows.append((label, f"{figures.perplexity:.3f}"))
    measured = summary.perplexity
    parts = (measured.change_in_words, measured.sample_in_words, measured.divergence_in_words)
    return [*rows, *([("the result beside the original", "; ".join(parts))] if measured.change is not None else [])]
