"""What a worker is doing, in a few words."""

from collections import Counter
from collections.abc import Mapping, Sequence

from astro_dist.console import in_words
from astro_dist.schedule.calls import (
    AccumulateHessians,
    Backward,
    Call,
    CopyTensors,
    DifferentiateLoss,
    Embed,
    EvaluateLoss,
    FinishEvaluation,
    Forward,
    ForwardChunk,
    LoadWeights,
    MeasureChannels,
    MergeHessians,
    OpenBlock,
    Reconstruct,
    SmoothChannels,
    SolveBlock,
    SolveRows,
    SplitBlock,
    TryBetas,
    WeighTokens,
    WriteBlock,
)
from astro_dist.schedule.names import is_block_unit, is_held_out
from astro_dist.schedule.unit_words import UnitWords

__all__ = ["phase_of", "worker_lines", "workers_in_words"]

_PHASES: dict[type[Call], str] = {
    Embed: "embedding",
    CopyTensors: "copying",
    OpenBlock: "reading",
    LoadWeights: "reading",
    Forward: "calibrating",
    SolveBlock: "solving",
    SplitBlock: "splitting",
    AccumulateHessians: "collecting",
    MergeHessians: "deciding",
    TryBetas: "choosing beta",
    SolveRows: "solving",
    Reconstruct: "reconstructing",
    WriteBlock: "writing",
    ForwardChunk: "passing on",
    FinishEvaluation: "evaluating",
    EvaluateLoss: "measuring perplexity",
    DifferentiateLoss: "differentiating the loss",
    Backward: "backward",
    WeighTokens: "weighing tokens",
    MeasureChannels: "measuring channels",
    SmoothChannels: "smoothing",
}
_MOST_ROWS, _SLOWEST = 8, 3
"""Number of workers up to which each has a line; of more only so many of the slowest have one."""


def phase_of(call: Call, chunks: Sequence[str]) -> str:
    """Say what a call does, such as "calibrating 5/16".

    Args:
        call: The call.
        chunks: Names of all chunks, in the order in which they travel.
    """
    phase = _PHASES[type(call)]
    match call:
        case (
            Forward(chunk=chunk)
            | ForwardChunk(chunk=chunk)
            | DifferentiateLoss(chunk=chunk)
            | Backward(chunk=chunk)
            | MeasureChannels(chunk=chunk)
        ) if chunk in chunks:
            kind = [other for other in chunks if is_held_out(other) == is_held_out(chunk)]
            held_out = is_held_out(chunk) and isinstance(call, Forward)
            return f"{'measuring' if held_out else phase} {kind.index(chunk) + 1}/{len(kind)}"
        case AccumulateHessians(share=number) | TryBetas(tile=number) | SolveRows(tile=number):
            return f"{phase} {number + 1}"
    return phase


def worker_lines(
    calls: Mapping[int, tuple[Call, float]], idle: int, words: UnitWords, chunks: Sequence[str]
) -> list[str]:
    """Say what the workers do: one line for each of a few; of many, how many do what, and the slowest.

    Args:
        calls: The call that each worker is at, and for how many seconds, by the worker's number.
        idle: Number of workers that have nothing to do.
        words: What people are told instead of the names of units.
        chunks: Names of all chunks, in the order in which they travel.
    """
    rows = {worker: f"worker {worker:<3} {_at(call, words, chunks)}" for worker, (call, _) in calls.items()}
    if len(calls) + idle <= _MOST_ROWS:
        return [rows[worker] for worker in sorted(rows)]
    slowest = sorted(calls, key=lambda worker: -calls[worker][1])[:_SLOWEST]
    lines = [f"{rows[worker]}, for {in_words(calls[worker][1])}" for worker in slowest]
    return [f"{_counted(calls, idle)}; the slowest:", *lines]


def workers_in_words(
    calls: Mapping[int, tuple[Call, float]], idle: int, words: UnitWords, chunks: Sequence[str]
) -> str:
    """Say in one line what the workers do: each of a few, or how many of many do what.

    Args:
        calls: The call that each worker is at, and for how many seconds, by the worker's number.
        idle: Number of workers that have nothing to do.
        words: What people are told instead of the names of units.
        chunks: Names of all chunks, in the order in which they travel.
    """
    if len(calls) + idle > _MOST_ROWS:
        return _counted(calls, idle)
    rows = [f"worker {worker}: {_at(call, words, chunks)}" for worker, (call, _) in sorted(calls.items())]
    return ", ".join([*rows, *([f"{idle} idle"] if idle or not rows else [])])


def _counted(calls: Mapping[int, tuple[Call, float]], idle: int) -> str:
    counts = Counter(_PHASES[type(call)] for call, _ in calls.values())
    counts["idle"] = idle
    kinds = ", ".join(f"{number} {phase}" for phase, number in counts.most_common() if number)
    return f"{len(calls) + idle} workers: {kinds}"


def _at(call: Call, words: UnitWords, chunks: Sequence[str]) -> str:
    """Say what a call is at and does, such as "block 3 of 30 · calibrating 5/16"."""
    block = getattr(call, "block", None)
    if block is None and not isinstance(call, DifferentiateLoss | LoadWeights):
        return words.unit(call.unit)
    place = words.unit(call.unit) if block is None or is_block_unit(call.unit) else words.block(block)
    return f"{place} · {phase_of(call, chunks)}"
