"""The report of a run as one HTML page and one table. It is made from records alone, so a run may still go on.

The page holds everything that it shows: it has no script, and loads nothing.
"""

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pyarrow
import pyarrow.parquet
from rich.filesize import decimal

from astro.quantization.layer_record import LayerRecord
from astro.storage.atomic import write_atomic, write_text
from astro_dist.console import in_words
from astro_dist.report.config_difference import changed_settings
from astro_dist.report.ending import ending_of
from astro_dist.report.findings import Findings
from astro_dist.report.heat_map import LEVELS, heat_map
from astro_dist.report.hidden_curve import hidden_curves
from astro_dist.report.layer_bars import costly_layers, worst_layers
from astro_dist.report.method_words import method_sentences
from astro_dist.report.tiles import headline, tiles
from astro_dist.report.verdict import verdict_on
from astro_dist.report.work_time import phase_parts, timeline
from astro_dist.run_directory.journal import Damaged, Event, Failed, PublishFailed, UploadFailed
from astro_dist.schedule.unit_words import UnitWords
from astro_dist.wording import counted

__all__ = ["TEMPLATES", "write_report"]

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("astro_dist", "report/templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
"""The templates of all pages."""
TEMPLATES.globals |= {"counted": counted, "decimal": decimal, "in_words": in_words, "levels": LEVELS}


def write_report(findings: Findings) -> Path:
    """Write `report/index.html` and `report/layers.parquet` into a run directory.

    Args:
        findings: What the run directory says.

    Returns:
        The path of the page.

    Raises:
        StorageError: The run directory cannot be written.
    """
    run, summary, status = findings.run, findings.summary, findings.status
    rows = [_row(*place, layer) for place, block in findings.rounds.items() for layer in block.layers]
    if rows:
        table = pyarrow.Table.from_pylist(rows)
        write_atomic(run.report / "layers.parquet", lambda partial: pyarrow.parquet.write_table(table, partial))
    layers = findings.layers
    page = TEMPLATES.get_template("page.html.j2").render(
        findings=findings,
        status=status,
        summary=summary,
        headline=headline(findings),
        date=_date(findings),
        verdict=verdict_on(summary.perplexity) if summary else None,
        tiles=tiles(findings),
        ending=ending_of(findings) if status.state == "stopped" else None,
        raised=[layer for layer in layers if layer.factorizations > 1],
        starved=[layer for layer in layers if layer.fallback],
        heat_map=heat_map({index: block.layers for index, block in findings.blocks.items()}),
        curves=hidden_curves(findings.hidden_errors),
        worst=worst_layers(layers),
        costly=costly_layers(layers),
        parts=phase_parts(findings.records, findings.events),
        timeline=timeline(findings.session, status.words),
        sentences=method_sentences(findings),
        failed=[row for event in findings.events if (row := _failure(event, status.words))],
        changed=changed_settings(findings.config) if findings.config else [],
        config_text=run.config.read_text(encoding="utf-8") if run.config.is_file() else "",
        has_table=bool(rows),
    )
    write_text(run.report / "index.html", page)
    return run.report / "index.html"


def _row(round_index: int, block: int, layer: LayerRecord) -> dict[str, Any]:
    """A row of the table, for layers that were solved together."""
    plain = dataclasses.asdict(layer)
    del plain["width_errors"]
    plain["rank"] = max(plain.pop("ranks").values(), default=0)
    nats = {"predicted_nats": layer.predicted_nats}
    return {"round": round_index, "block": block, **plain, **nats, "seconds": sum(layer.seconds.values())}


def _date(findings: Findings) -> str:
    """The day of the last event, in UTC; empty where there is none."""
    if not findings.events:
        return ""
    day = datetime.datetime.fromtimestamp(findings.events[-1].time, datetime.UTC)
    return f"{day.day} {day:%B %Y}"


def _failure(event: Event, words: UnitWords) -> Sequence[str] | None:
    """A row for what failed or was found damaged; None for other events."""
    if isinstance(event, Failed):
        return words.unit(event.unit), event.kind, event.cause
    if isinstance(event, Damaged):
        return words.unit(event.unit), event.NAME, event.reason
    if isinstance(event, UploadFailed | PublishFailed):
        return words.unit(getattr(event, "unit", "")), event.NAME.replace("_", " "), event.cause
    return None
