"""The figures of a finished run, from its records."""

import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from astro.config import Quantization
from astro.formats import LAYOUTS
from astro.process import peak_rss_bytes
from astro.quantization.layer_record import fallbacks
from astro.timing import add_seconds
from astro_dist.export.assemble import final_settings
from astro_dist.planning.units import Plan
from astro_dist.run_directory.journal import last_of_each_unit
from astro_dist.run_directory.records import RunDirectory
from astro_dist.schedule.names import block_unit, evaluate_unit, head_unit, stream_names
from astro_dist.source.model_info import BaseModel

__all__ = ["summarize"]

_RUINED = 2.0
"""Times the original's perplexity from which on a result is spoken of."""


def summarize(
    plan: Plan,
    run: RunDirectory,
    quantization: Quantization,
    notes: Sequence[str],
    base: BaseModel,
    workers: Mapping[int, Mapping[str, Any]],
    wall_s: float,
    resumed: int,
) -> dict[str, Any]:
    """Figures of the whole run; wall time and peak memory are those of this session.

    Args:
        plan: of the run, all of its units finished.
        run: the run directory.
        quantization: of the run.
        notes: what the user was told before it started.
        base: what was quantized.
        workers: what each says of itself.
        wall_s: seconds of this session.
        resumed: units that were finished before it.
    """
    final = LAYOUTS[quantization.format].server_notes(final_settings(quantization, plan, run), plan.ignore)
    streams = stream_names(run.rounds)
    notes = [*notes, *(note for note in final if note not in notes)]
    rounds = [[run.read(block_unit(r, unit.index)) for unit in plan.blocks] for r in range(run.rounds)]
    layers = [[layer for record in records for layer in record["layers"]] for records in rounds]
    weights = sum(layer["rows"] * layer["columns"] for layer in layers[-1])
    original, *results = (_perplexity(run.read(head_unit(stream))) for stream in streams)
    by_round = [
        {"perplexity": perplexity, "mean_relative_error": sum(layer["relative_error"] for layer in own) / len(own)}
        for perplexity, own in zip(results, layers, strict=True)
    ]
    return {
        "perplexity": {"original": original, "quantized": results[-1]},
        "rounds": by_round,
        "mean_relative_error": by_round[-1]["mean_relative_error"],
        "average_bits": sum(layer["bits"] * layer["rows"] * layer["columns"] for layer in layers[-1]) / weights,
        "betas": {f"{beta:g}": count for beta, count in sorted(Counter(layer["beta"] for layer in layers[-1]).items())},
        "wall_s": round(wall_s, 2),
        "resumed_units": resumed,
        "phases_s": _phases(run, rounds),
        "peak_rss_bytes": {
            "driver": peak_rss_bytes(),
            **{f"worker-{number}": worker["peak_rss_bytes"] for number, worker in workers.items()},
        },
        "bytes_read": plan.read_bytes,
        "bytes_written": sum((run.model / file).stat().st_size for file in plan.files),
        "fallbacks": fallbacks(layers[-1]),
        "retries": run.journal.lines("failed"),
        "mended": last_of_each_unit(run.journal.lines("damaged")),
        "notes": notes + _ruin(original, results[-1]),
        "units": {"blocks": len(plan.blocks), "copies": len(plan.copies)},
        "model": str(run.model),
        "python": platform.python_version(),
        "base_model": base.plain(),
    }


def _ruin(original: float | None, quantized: float | None) -> list[str]:
    """What to say of a result that is hardly a language model any more."""
    if original is None or quantized is None or quantized < _RUINED * original:
        return []
    return [
        f"the hold-out perplexity is {quantized / original:.1f} times the original's: look at the layer errors, and "
        "try the model before you rely on it; mode sequential, more bits, smaller groups or beta: auto lose less"
    ]


def _phases(run: RunDirectory, rounds: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Seconds of all workers and rounds together, by phase."""
    records = [record for records in rounds for record in records]
    records += [run.read(evaluate_unit(block)) for block in range(len(rounds[0]))]
    phases: dict[str, float] = {}
    passed = sum(line["seconds"] for line in run.journal.lines("passed"))
    if passed:
        phases["pass_on"] = passed
    for record in records:
        add_seconds(phases, record.get("seconds", {}))
    return {phase: round(seconds, 2) for phase, seconds in phases.items()}


def _perplexity(result: Mapping[str, Any]) -> float | None:
    # e^700 is the largest that a float holds, and no more of a language model than infinity
    return math.exp(min(result["negative_log_likelihood"] / result["tokens"], 700)) if result else None
