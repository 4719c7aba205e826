"""Finished runs beside each other: what each of them cost, and what it lost."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from astro.quantization.layer_record import LayerRecord
from astro_dist.export.finished_run import FinishedRun
from astro_dist.run_directory.layout import RunLayout
from astro_dist.run_directory.summary import Perplexity
from astro_dist.run_directory.unit_record import BlockResult
from astro_dist.schedule.names import block_of_unit

__all__ = ["Comparison", "RunFigures", "compare_runs"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFigures:
    """Figures of a finished run.

    Attributes:
        run: Run directory, as it was given.
        base: Name of the model that was quantized.
        bits: Mean number of bits of a quantized weight, without scales.
        group_size: Number of columns that share a scale; -1 for whole rows.
        also_rounded: What servers round besides weights, such as "inputs int8 per token"; empty where nothing.
        corrections: Ranks of the corrections and the size of their adapter, which is part of that of the result; empty
            where there are none.
        mode: Mode of the run, and its number of rounds where there are several.
        size_bytes: Size of the result, corrections included.
        share: Size of the result, as a share of the source.
        perplexity: Perplexities and divergence on the held-out text.
        wall_s: Length of the last session, in seconds.
        resumed: Whether there were sessions before it, whose time is not counted.
        worst_layer: Names of the layers with the largest relative error, joined by '+'.
        worst_error: The relative error of that layer.
        fallbacks: Number of layers that could not be quantized just as configured.
        source_sha256: Fingerprint of the source.
        tokens_sha256: SHA-256 of the tokens, to calibrate on and held out.
        version: Version of this project that made the run.
    """

    run: str
    base: str
    bits: float
    group_size: int
    also_rounded: str
    corrections: str
    mode: str
    size_bytes: int
    share: float
    perplexity: Perplexity
    wall_s: float
    resumed: bool
    worst_layer: str
    worst_error: float
    fallbacks: int
    source_sha256: str
    tokens_sha256: str
    version: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several runs, and what makes their figures hard to compare.

    Attributes:
        runs: Figures of each run, in the order in which they were given.
        notes: Sentences for the user.
    """

    runs: Sequence[RunFigures]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as a JSON object."""
        return dataclasses.asdict(self)


def compare_runs(roots: Sequence[Path]) -> Comparison:
    """Read the figures of finished runs.

    Args:
        roots: Run directories.

    Raises:
        ConfigError: A folder holds no run, or a run that is not finished.
        DamagedError: The figures of a run cannot be read.
    """
    runs = [_figures(root) for root in roots]
    notes = []
    if len({run.source_sha256 for run in runs}) > 1:
        notes.append("the runs quantized different models: compare changes, not perplexities")
    originals = {run.perplexity.original for run in runs if run.perplexity.original is not None}
    if len({run.tokens_sha256 for run in runs}) > 1:
        same = "; the original's perplexity differs too, so the held-out text does" if len(originals) > 1 else ""
        notes.append(f"the runs did not have the same tokens to calibrate on and held out{same}")
    if len({run.version for run in runs}) > 1:
        notes.append(f"made by different versions: {', '.join(sorted({run.version for run in runs}))}")
    return Comparison(runs, notes)


def _figures(root: Path) -> RunFigures:
    finished = FinishedRun.open(RunLayout.around(root.expanduser().absolute()).root)
    summary, config = finished.summary, finished.config
    layers = _last_layers(finished)
    worst = max(layers, key=lambda layer: layer.relative_error)
    rounds, fallbacks, added = config.execution.rounds, summary.fallbacks, summary.corrections
    return RunFigures(
        run=str(root),
        base=summary.base_model.name or config.model.source,
        bits=summary.average_bits,
        group_size=config.quantization.group_size,
        also_rounded=", ".join(config.activations.rounded_in_words),
        corrections=f"rank {added.ranks_in_words}, {decimal(added.size_bytes)}" if added else "",
        mode=f"{config.execution.mode}{f' × {rounds}' if rounds > 1 else ''}{', tuned' if summary.has_tuned else ''}",
        size_bytes=summary.total_bytes,
        share=summary.total_bytes / summary.bytes_read,
        perplexity=summary.perplexity,
        wall_s=summary.wall_s,
        resumed=summary.resumed_units > 0,
        worst_layer=worst.name,
        worst_error=worst.relative_error,
        fallbacks=len(fallbacks.damping_raised) + sum(map(len, fallbacks.experts.values())),
        source_sha256=finished.identity.source_sha256,
        tokens_sha256=finished.identity.tokens_sha256,
        version=finished.identity.version,
    )


def _last_layers(finished: FinishedRun) -> list[LayerRecord]:
    """Return the records of the last round's layers."""
    run, last = finished.run, finished.config.execution.rounds - 1
    places = ((unit, block_of_unit(unit)) for unit in run.recorded_units())
    units = [unit for unit, place in places if place and place[0] == last]
    return [layer for unit in units for layer in run.read(unit, BlockResult).layers]
