"""A run as one HTML page and one table, from its records alone: while it goes on or after."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from astro.storage.atomic import read_json, write_atomic, write_text
from astro_dist.report.status import read_status
from astro_dist.run_directory.identity import read_identity
from astro_dist.run_directory.records import RunDirectory

__all__ = ["write_report"]

_WIDTH, _HEIGHT, _MARGIN = 860, 240, 46
_COLOURS = ("#1f6fb4", "#d1571e", "#2e8540", "#8a4bb0", "#b8860b", "#5f6b73", "#c2185b", "#00838f")
_FAILED = ("failed", "damaged", "upload_failed", "publish_failed")
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f23; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #dfe3e8; vertical-align: top; }
pre { background: #f5f6f8; padding: .8rem; overflow-x: auto; }
svg text { font: 11px system-ui, sans-serif; }
"""


def write_report(root: Path) -> Path:
    """Write `report/index.html` and `report/layers.parquet` into a run directory.

    Args:
        root: the run directory.

    Returns:
        Path of the page.

    Raises:
        ConfigError: the folder holds no run.
        StorageError: the run directory cannot be written.
    """
    status = read_status(root)
    run = RunDirectory(root, read_identity(root)["key"])
    layers = _layers(run)
    folder = root / "report"
    if layers:
        table = pyarrow.Table.from_pylist(layers)
        write_atomic(folder / "layers.parquet", lambda partial: pyarrow.parquet.write_table(table, partial))
    summary = read_json(run.summary) if run.summary.is_file() else {}
    config = (root / "config.yaml").read_text(encoding="utf-8")
    write_text(folder / "index.html", _page(root, status, summary, layers, run.journal.lines(), config))
    return folder / "index.html"


def _layers(run: RunDirectory) -> list[dict[str, Any]]:
    """One row a group of layers and round."""
    rows = []
    for path in sorted((run.root / "records").glob("round-*-block-*.json")):
        _, number, _, block = path.stem.split("-")
        for layer in run.read(path.stem)["layers"]:
            kept = {name: value for name, value in layer.items() if name not in ("seconds", "width_errors")}
            rows.append({"round": int(number), "block": int(block), **kept, "seconds": sum(layer["seconds"].values())})
    return rows


def _page(
    root: Path,
    status: dict[str, Any],
    summary: dict[str, Any],
    layers: Sequence[dict[str, Any]],
    journal: Sequence[dict[str, Any]],
    config: str,
) -> str:
    newest = max((layer["round"] for layer in layers), default=0)
    last = [layer for layer in layers if layer["round"] == newest]
    worst = sorted(last, key=lambda layer: -layer["relative_error"])[:10]
    parts = [
        f"<h1>{_text(root.name)}: {_text(status['state'])}</h1>",
        f"<p>{status['blocks']['done']} of {status['blocks']['total']} blocks, {status['units']['done']} of "
        f"{status['units']['total']} units done.</p>",
        _damage(status["damaged"]),
        _figures(summary),
        "<h2>What was degraded, and what was tried again</h2>",
        *_degraded(last, journal),
        "<h2>Relative layer error by block</h2>",
        _chart(last) if last else "<p>No block is finished yet.</p>",
        "<h2>Largest relative layer errors</h2>",
        _table(
            ("layers", "bits", "relative error", "β", "its gain before refinement"),
            [
                (
                    layer["name"],
                    str(layer["bits"]),
                    f"{layer['relative_error']:.3g}",
                    f"{layer['beta']:g}",
                    f"{layer['beta_gain']:.1%}",
                )
                for layer in worst
            ],
        ),
        f"<h2>Configuration</h2><pre>{_text(config)}</pre>",
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(root.name)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _degraded(layers: Sequence[dict[str, Any]], journal: Sequence[dict[str, Any]]) -> list[str]:
    raised = [(layer["name"], f"{layer['damping']:g}") for layer in layers if layer["factorizations"] > 1]
    starved = [(layer["name"], str(layer["routed_tokens"]), layer["fallback"]) for layer in layers if layer["fallback"]]
    failed = [
        (line.get("unit", ""), line.get("kind", line["event"]), line.get("cause", line.get("reason", "")))
        for line in journal
        if line["event"] in _FAILED
    ]
    return [
        _table(("layers", "damping"), raised) if raised else "<p>No damping had to be raised.</p>",
        _table(("layers of experts", "routed tokens", "instead of their own statistics"), starved) if starved else "",
        _table(("unit", "what", "cause"), failed) if failed else "<p>Nothing failed.</p>",
    ]


def _damage(files: Sequence[str]) -> str:
    """What a finished model has lost since."""
    if not files:
        return ""
    return "<h2>Damaged since it was finished</h2>" + _table(
        ("file, gone or of another size",), ([file] for file in files)
    )


def _figures(summary: dict[str, Any]) -> str:
    """What a finished run says of itself; nothing before."""
    if not summary:
        return ""
    perplexity, rows = summary["perplexity"], []
    if perplexity["original"] is not None:
        rows.append(("perplexity of the original", f"{perplexity['original']:.3f}"))
        for number, result in enumerate(summary["rounds"]):
            label = "perplexity of the result" if len(summary["rounds"]) == 1 else f"perplexity of round {number}"
            rows.append((label, f"{result['perplexity']:.3f}"))
    rows += [
        ("average width of quantized weights", f"{summary['average_bits']:.2f} bits"),
        ("read, written", f"{summary['bytes_read'] / 1e9:.2f} GB, {summary['bytes_written'] / 1e9:.2f} GB"),
        ("seconds of the last session", f"{summary['wall_s']:.0f}"),
        ("strengths β and how many groups took them", ", ".join(f"{b}: {n}" for b, n in summary["betas"].items())),
        ("seconds of all workers by phase", ", ".join(f"{p} {s:.0f}" for p, s in summary["phases_s"].items())),
        (
            "peak resident memory",
            ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in summary["peak_rss_bytes"].items()),
        ),
    ]
    if "publish" in summary:
        published = summary["publish"]
        rows.append(("published", f"{published['url']}, commit {published['commit']}, {published['files']} files"))
    rows += [("note", note) for note in summary["notes"]]
    return _table(("figure", "value"), rows)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _chart(layers: Sequence[dict[str, Any]]) -> str:
    """Relative error over blocks, one line for each kind of layer."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for layer in layers:
        kind = "+".join(name.rpartition(".")[2] for name in str(layer["name"]).split("+"))
        lines.setdefault(kind, []).append((layer["block"], layer["relative_error"]))
    blocks = max(max(layer["block"] for layer in layers), 1)
    top = max(layer["relative_error"] for layer in layers) or 1.0
    wide, high = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN

    def at(block: int, error: float) -> str:
        return f"{_MARGIN + wide * block / blocks:.1f},{_HEIGHT - _MARGIN - high * error / top:.1f}"

    right, bottom = _WIDTH - _MARGIN, _HEIGHT - _MARGIN
    drawn = [
        f'<line x1="{_MARGIN}" y1="{bottom}" x2="{right}" y2="{bottom}" stroke="#8c959f"/>',
        _label(_MARGIN, bottom + 16, "block 0"),
        _label(right - 40, bottom + 16, f"block {blocks}"),
        _label(4, _MARGIN + 4, f"{top:.2g}"),
    ]
    for number, (kind, points) in enumerate(sorted(lines.items())):
        colour, path = _COLOURS[number % len(_COLOURS)], " ".join(at(*point) for point in sorted(points))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        drawn.append(_label(_MARGIN + 10 + 200 * (number % 4), 14 + 14 * (number // 4), kind, colour))
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(drawn)}</svg>'


def _label(x: int, y: int, text: str, colour: str = "#57606a") -> str:
    return f'<text x="{x}" y="{y}" style="fill:{colour}">{_text(text)}</text>'


def _text(value: str) -> str:
    return html.escape(str(value))
