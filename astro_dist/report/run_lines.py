"""What `report` and `status` say of a run's result at a terminal."""

import shlex
from pathlib import Path

from astro.errors import ConfigError, DamagedError
from astro_dist.config.yaml_file import load_recorded_config
from astro_dist.report.command_output import fallback_lines, figure_lines, next_lines
from astro_dist.report.findings import Findings
from astro_dist.report.layer_bars import short_name
from astro_dist.report.status import Status
from astro_dist.report.verdict import verdict_on
from astro_dist.run_directory.layout import RunLayout
from astro_dist.run_directory.summary import read_summary

__all__ = ["finished_lines", "report_lines"]


def report_lines(findings: Findings) -> list[str]:
    """Say the most important things of the page: the verdict, the worst layer and the fallbacks.

    Args:
        findings: What the run directory says.
    """
    status, layers = findings.status, findings.layers
    if findings.summary is not None:
        verdict = verdict_on(findings.summary.perplexity).in_words
    else:
        verdict = f"not finished: {status.state}, {status.blocks.done} of {status.blocks.total} blocks done."
    worst = max(layers, key=lambda layer: layer.relative_error, default=None)
    largest = f"{worst.relative_error:.3g}, {short_name(worst)}" if worst else "none measured yet"
    largest += ", before scales were tuned" if findings.summary is not None and findings.summary.has_tuned else ""
    return [
        f"Verdict: {verdict}",
        f"Largest output error: {largest}",
        *(fallback_lines(status.fallbacks, status.min_tokens) or ["Fallbacks: none"]),
    ]


def finished_lines(status: Status, root: Path) -> list[str]:
    """Say the figures of a run and the next commands; nothing while it goes on, or where a file of it is damaged.

    Args:
        status: State of the run.
        root: Folder of the run directory.
    """
    if status.state == "stopped":
        return ["To go on:", f"  astro-dist quantize {shlex.quote(str(RunLayout(root).config))}"]
    if status.state != "complete":
        return []
    try:
        summary = read_summary(RunLayout(root).summary)
        model = load_recorded_config(RunLayout(root).config).model
    except (ConfigError, DamagedError):
        return []
    return [*figure_lines(summary), *next_lines(summary, root, model)]
