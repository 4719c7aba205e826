"""What was seen of a model's layers, in words and as rows of a table, for terminals and pages."""

from collections.abc import Sequence

from rich.filesize import decimal
from rich.table import Table

from astro.calibration.outlier_channels import OUTLIER_RATIO
from astro_dist.console import compact_table
from astro_dist.evaluation.inspection import Inspection, KindFigures, ModelFigures
from astro_dist.wording import counted

__all__ = ["TITLES", "facts", "inspection_lines", "inspection_rows", "inspection_table"]

TITLES = ("layers", "outlier channels", "block: most", "ratio", "input kurtosis", "output kurtosis", "weight")
"""Titles of the columns of a table of layers by kind."""
_LEGEND = (
    f"Outlier channels are inputs whose mean magnitude is over {OUTLIER_RATIO:g} times their layer's; ratio is the "
    "largest such multiple; block: most is the block with the most of them, and how many; weight is the largest weight "
    "as a multiple of the root mean square of its layer"
)
"""What the columns of the table mean."""
_SHOWN = 5
"""Number of layers that are named."""


def inspection_rows(inspection: Inspection) -> list[tuple[str, ...]]:
    """Return the cells of each kind of layers, as the titles name them; with two models both, with an arrow between.

    Args:
        inspection: What was seen.
    """
    kinds_before = inspection.before.by_kind() if inspection.before else {}
    rows = []
    for kind, layers in inspection.now.by_kind().items():
        now = _cells(KindFigures.of(layers))
        if kind in kinds_before:
            before = _cells(KindFigures.of(kinds_before[kind]))
            now = tuple(f"{b} → {n}" if b != n else n for b, n in zip(before, now, strict=True))
        rows.append((f"{kind} ({len(layers)})", *now))
    return rows


def inspection_table(inspection: Inspection) -> Table:
    """Make the table of layers by kind; with two models the figures of the other one stand in a line below.

    Args:
        inspection: What was seen.
    """
    table = compact_table()
    table.add_column(TITLES[0], overflow="fold")
    for title in TITLES[1:]:
        table.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True)
    kinds_before = inspection.before.by_kind() if inspection.before else {}
    for kind, layers in inspection.now.by_kind().items():
        table.add_row(f"{kind} ({len(layers)})", *_cells(KindFigures.of(layers)))
        if kind in kinds_before:
            table.add_row("  before", *_cells(KindFigures.of(kinds_before[kind])))
    return table


def facts(inspection: Inspection) -> list[str]:
    """Say what was looked at, in a few words each.

    Args:
        inspection: What was seen.
    """
    windows = counted(inspection.windows, "window")
    parts = [
        _count(inspection.now, inspection.before),
        f"{inspection.text}, {windows} of {inspection.window} tokens",
        f"{inspection.dtype.removeprefix('torch.')} on {inspection.device}",
    ]
    if inspection.now.unseen:
        parts.append(f"{counted(inspection.now.unseen, 'layer')} of experts not seen")
    return parts


def inspection_lines(inspection: Inspection) -> list[str]:
    """Say what was looked at, and name the layers with the most outlier channels.

    Args:
        inspection: What was seen.
    """
    now = inspection.now
    lines = [f"{now.model}, block by block; most memory {decimal(inspection.peak_rss_bytes)}"]
    if inspection.before:
        lines.append(f"Before: {inspection.before.model}")
    lines += [_LEGEND, "; ".join(facts(inspection))]
    worst = sorted(now.layers, key=lambda layer: (-len(layer.outlier_channels), -layer.input_ratio))[:_SHOWN]
    for layer in worst:
        if layer.outlier_channels:
            channels = ", ".join(map(str, layer.outlier_channels[:_SHOWN]))
            more = ", ..." if len(layer.outlier_channels) > _SHOWN else ""
            number = counted(len(layer.outlier_channels), "outlier channel")
            lines.append(f"{' + '.join(layer.names)}: {number} ({channels}{more}), up to {layer.input_ratio:.1f} times")
    return lines


def _count(now: ModelFigures, before: ModelFigures | None) -> str:
    count = counted(now.outlier_channels, "outlier channel")
    return f"{before.outlier_channels} → {count}" if before else count


def _cells(kind: KindFigures) -> Sequence[str]:
    most = kind.most
    return (
        str(kind.outlier_channels),
        f"{most.block}: {len(most.outlier_channels)}" if most.outlier_channels else "-",
        f"{kind.input_ratio:.1f}",
        f"{kind.input_kurtosis:.1f}",
        f"{kind.output_kurtosis:.1f}",
        f"{kind.weight_ratio:.1f}",
    )
