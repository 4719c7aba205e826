"""The making of a run's summary from its records."""

import dataclasses
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from astro.config import Quantization
from astro.formats import LAYOUTS
from astro.process import peak_rss_bytes
from astro.quantization.bit_allocation import are_in_nats
from astro.quantization.layer_record import Fallbacks, LayerRecord, predicted_nats
from astro.timing import add_seconds
from astro_dist.config.schema import RunConfig
from astro_dist.export.adapter_file import ADAPTER_WEIGHTS
from astro_dist.export.assemble import final_schemes, smoothed_inputs
from astro_dist.planning.units import Plan
from astro_dist.run_directory.correction_figures import CorrectionFigures
from astro_dist.run_directory.journal import Damaged, Failed, Passed, last_of_each_unit
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.smoothed_kinds import SmoothedKind, smoothed_kinds
from astro_dist.run_directory.summary import Perplexity, RoundFigures, Summary, UnitCounts, perplexity_of
from astro_dist.run_directory.tuning import TuningFigures
from astro_dist.run_directory.unit_record import (
    BlockResult,
    EvaluationResult,
    LossResult,
    SmoothingResult,
    WeightsResult,
)
from astro_dist.schedule.names import (
    block_unit,
    evaluate_unit,
    head_unit,
    smoothing_unit,
    stream_names,
    weights_unit,
)
from astro_dist.source.model_info import BaseModel
from astro_dist.wording import counted

__all__ = ["Session", "summarize"]

_RUINED = 2.0
"""The ratio of the result's perplexity to the original's from which on the summary has a note about it."""


@dataclasses.dataclass(frozen=True)
class Session:
    """Holds what only the driver knows about the session that finished a run.

    Attributes:
        workers: Answers of the workers to `Executor.describe`, by number of the worker.
        wall_s: Length of the session, in seconds.
        resumed: Number of units that were finished before the session.
    """

    workers: Mapping[int, Mapping[str, Any]]
    wall_s: float
    resumed: int


def summarize(
    plan: Plan, run: RunDirectory, config: RunConfig, notes: Sequence[str], base: BaseModel, session: Session
) -> Summary:
    """Put together the figures of the whole run. Wall time and peak memory are those of this session.

    Args:
        plan: Plan of the run, whose units are all finished.
        run: Run directory.
        config: Configuration of the run.
        notes: Notes that the user has read before the run started.
        base: Model that was quantized.
        session: Session that finished the run.

    Returns:
        The summary.

    Raises:
        DamagedError: A record cannot be read.
    """
    quantization = config.quantization
    all_notes = _with_final_schemes(notes, plan, run, quantization)
    rounds = [[run.read(block_unit(r, unit.index), BlockResult) for unit in plan.blocks] for r in range(run.rounds)]
    layers = [[layer for block in blocks for layer in block.layers] for blocks in rounds]
    last = layers[-1]
    original, *results = (run.read_if_there(head_unit(stream), LossResult) for stream in stream_names(run.rounds))
    perplexity = Perplexity.of(original, results[-1])
    tuning = TuningFigures.of(block.tuning for block in rounds[-1])
    untuned = [tuning.untuned_in_words] if tuning is not None and tuning.untuned else []
    smoothing = smoothed_kinds(smoothed_inputs(run, len(plan.blocks)))
    adapter = run.model / ADAPTER_WEIGHTS
    by_round = tuple(map(RoundFigures, map(perplexity_of, results), map(_mean_error, layers)))
    return Summary(
        perplexity=perplexity,
        rounds=by_round,
        mean_relative_error=by_round[-1].mean_relative_error,
        coverage=plan.coverage,
        average_bits=sum(layer.bits * layer.num_weights for layer in last) / sum(layer.num_weights for layer in last),
        betas={f"{beta:g}": count for beta, count in sorted(Counter(layer.beta for layer in last).items())},
        wall_s=round(session.wall_s, 2),
        resumed_units=session.resumed,
        phases_s=_phases(run, rounds),
        peak_rss_bytes={
            "driver": peak_rss_bytes(),
            **{f"worker-{number}": worker["peak_rss_bytes"] for number, worker in session.workers.items()},
        },
        bytes_read=plan.read_bytes,
        bytes_written=sum((run.model / file).stat().st_size for file in plan.files),
        fallbacks=Fallbacks.of(last),
        retries=tuple(run.journal.of_kind(Failed)),
        mended=last_of_each_unit(run.journal.of_kind(Damaged)),
        notes=(*all_notes, *_unmeasured(run, len(plan.blocks)), *_unsmoothed(smoothing), *untuned, *_ruin(perplexity)),
        units=UnitCounts(len(plan.blocks), len(plan.copies)),
        model=str(run.model),
        python=platform.python_version(),
        base_model=base,
        predicted_divergence=predicted_nats(last),
        widths_by=_measure(layers[0]) if quantization.bits == "auto" else "",
        inputs=config.activations.in_words,
        also_rounded=config.activations.rounded_in_words,
        smoothing=smoothing,
        corrections=CorrectionFigures.of(last, adapter.stat().st_size) if adapter.is_file() else None,
        tuning=tuning,
    )


def _with_final_schemes(notes: Sequence[str], plan: Plan, run: RunDirectory, quantization: Quantization) -> list[str]:
    """Replace what was said before the run of every width that a layer might get by what is so of those that it got."""
    server_notes = LAYOUTS[quantization.format].server_notes
    linears = {linear.name: linear for unit in plan.blocks for linear in unit.linears}
    possible = {name: quantization.possible_schemes(name, linear.columns) for name, linear in linears.items()}
    settled = {name: (scheme,) for name, scheme in final_schemes(quantization, plan, run).items()}
    before, final = server_notes(possible, plan.ignore), server_notes(settled, plan.ignore)
    kept = [note for note in notes if note not in before or note in final]
    return [*kept, *(note for note in final if note not in kept)]


def _mean_error(layers: Sequence[LayerRecord]) -> float:
    return sum(layer.relative_error for layer in layers) / len(layers)


def _measure(layers: Sequence[LayerRecord]) -> str:
    return "nats" if are_in_nats(layers) else "relative error"


def _unmeasured(run: RunDirectory, num_blocks: int) -> list[str]:
    """A note about blocks whose tokens the loss could not weigh; none where it could."""
    results = (run.read_if_there(weights_unit(block), WeightsResult) for block in range(num_blocks))
    reasons = [result.reason for result in results if result is not None and result.reason]
    if not reasons:
        return []
    return [
        f"in {counted(len(reasons), 'block')} tokens are weighted by their norm, because the loss's gradient could not "
        f"be measured: {Counter(reasons).most_common(1)[0][0]}"
    ]


def _unsmoothed(kinds: Sequence[SmoothedKind]) -> list[str]:
    """A note for each kind of inputs that were to be smoothed and stay as they are."""
    return [f"activations.smoothing: {kind.in_words}" for kind in kinds if kind.reason]


def _ruin(perplexity: Perplexity) -> list[str]:
    """A note about a result that is hardly a language model any more; none for other results."""
    original, quantized = perplexity.original, perplexity.quantized
    if original is None or quantized is None or quantized < _RUINED * original:
        return []
    return [
        f"the hold-out perplexity is {quantized / original:.1f} times the original's: look at the layer errors, and "
        "try the model before you rely on it; mode stages loses less than blocks, and sequential less than stages, and "
        "so do more bits, smaller groups or beta: auto"
    ]


def _phases(run: RunDirectory, rounds: Sequence[Sequence[BlockResult]]) -> dict[str, float]:
    """The time of all workers and rounds together by phase, in seconds."""
    phases: dict[str, float] = {}
    passed = sum(event.seconds for event in run.journal.of_kind(Passed))
    if passed:
        phases["pass_on"] = passed
    for seconds in _seconds(run, rounds):
        add_seconds(phases, seconds)
    return {phase: round(seconds, 2) for phase, seconds in phases.items()}


def _seconds(run: RunDirectory, rounds: Sequence[Sequence[BlockResult]]) -> Iterable[Mapping[str, float]]:
    """The time by phase of every unit that measures it, in seconds."""
    yield from (block.seconds for blocks in rounds for block in blocks)
    for index in range(len(rounds[0])):
        measured = (
            run.read_if_there(evaluate_unit(index), EvaluationResult),
            run.read_if_there(weights_unit(index), WeightsResult),
            run.read_if_there(smoothing_unit(index), SmoothingResult),
        )
        yield from (result.seconds for result in measured if result is not None)
