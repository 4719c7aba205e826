"""Put into words what a command found, for a person at a terminal."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal

from astro_dist.console import in_words
from astro_dist.wording import counted, group_size_in_words, percent, sentence

if TYPE_CHECKING:  # some of them import torch or transformers, which the command at hand may not need
    from astro.quantization.layer_record import Fallbacks
    from astro_dist.config.schema import ModelConfig, RunConfig
    from astro_dist.export.verify import Verification
    from astro_dist.planning.coverage import Coverage
    from astro_dist.report.status import Status
    from astro_dist.run_directory.published_model import PublishedModel
    from astro_dist.run_directory.summary import Summary

__all__ = [
    "coverage_lines",
    "fallback_lines",
    "figure_lines",
    "next_lines",
    "publication_line",
    "settings_line",
    "status_lines",
    "summary_lines",
    "verification_lines",
]

_NAMED_LAYERS = 10
"""Number of layers whose weight errors are shown."""
_NAMED_FILES = 3
"""Number of damaged files that are named."""


def summary_lines(summary: "Summary", config: "RunConfig") -> list[str]:
    """Describe a finished run.

    Args:
        summary: Figures of the run.
        config: Configuration of the run.
    """
    return [
        *figure_lines(summary, config.calibration.text_in_words),
        *coverage_lines(summary.coverage),
        *fallback_lines(summary.fallbacks, config.experts.min_tokens),
        *(f"note: {note}" for note in summary.notes),
        f"Done in {in_words(summary.wall_s)} from reading the configuration on: {summary.model}",
        *next_lines(summary, config.output.dir, config.model),
    ]


def figure_lines(summary: "Summary", source: str = "") -> list[str]:
    """Say how good and how large a result is.

    Args:
        summary: Figures of the run.
        source: Text that was held out, as the configuration names it; empty where it is not to be named.
    """
    lines = _quality_lines(summary, source)
    share = percent(summary.total_bytes / summary.bytes_read)
    corrected = ", corrections included" if summary.corrections is not None else ""
    mean = f"; {summary.average_bits:.3g} bits a quantized weight on average" if summary.widths_by else ""
    inputs = f"; config.json asks servers to round inputs: {summary.inputs}" if summary.inputs else ""
    lines.append(f"{decimal(summary.total_bytes)} written, {share} of the source{corrected}{mean}{inputs}")
    tried = sum(summary.betas.values())
    if tried:
        helped = tried - summary.betas.get("0", 0)
        lines.append(f"Regularized before they were rounded: {helped} of {tried} groups of layers")
    if summary.tuning is not None and summary.has_tuned:
        lines.append(sentence(summary.tuning.in_words))
    if summary.corrections is not None:
        lines.append(f"{sentence(summary.corrections.in_words)}. They are the adapter that servers have to load too")
    return lines


def _quality_lines(summary: "Summary", source: str) -> list[str]:
    measured = summary.perplexity
    if measured.original is None or measured.quantized is None:
        return []
    rounded = f" with {' and '.join(summary.also_rounded)}" if summary.also_rounded else ""
    change = f"{measured.original:.3f} → {measured.quantized:.3f}{rounded}"
    parts = filter(None, (change, measured.change_in_words, measured.sample_in_words))
    divergences = "; ".join(filter(None, (measured.divergence_in_words, summary.prediction_in_words)))
    perplexity = f"Hold-out perplexity {', '.join(parts)}{f' ({source})' if source else ''}"
    return [perplexity, divergences] if divergences else [perplexity]


def next_lines(summary: "Summary", root: Path, model: "ModelConfig") -> list[str]:
    """Say where a finished model was published, or which commands one may want next.

    Args:
        summary: Figures of the run.
        root: Folder of the run directory.
        model: Section of the configuration that names the original, beside which the result is judged.
    """
    if summary.publish is not None:
        return [publication_line(summary.publish)]
    run = shlex.quote(str(root))
    original = shlex.quote(f"{model.source}@{model.revision}" if model.revision else model.source)
    return [
        "Next:",
        f"  astro-dist report {run}",
        f"  astro-dist try {run} 'The capital of France is'",
        f"  astro-dist evaluate {run} --text ANOTHER_TEXT --against {original}",
        f"  astro-dist verify {run}",
        f"  astro-dist publish {run} --repo ORG/NAME",
    ]


def settings_line(config: "RunConfig") -> str:
    """Describe the main settings of a run.

    Args:
        config: Configuration of the run.
    """
    q, calibration, execution = config.quantization, config.calibration, config.execution
    bits = f"{q.average_bits:g} bits on average" if q.bits == "auto" else f"{q.bits} bits"
    inputs = f", inputs {words}" if (words := config.activations.in_words) else ""
    inputs += ", FP8 cache of keys and values" if config.activations.rounds_cache else ""
    rounds = counted(execution.rounds, "round")
    rounds += f", scales tuned in {counted(q.tune_steps, 'step')}" if q.tune_steps else ""
    is_open = "auto" in (calibration.samples, calibration.sequence_length)
    most = f"{'up to ' if is_open else ''}{calibration.most_samples} × {calibration.longest_sequence} tokens"
    return (
        f"{config.model.source}: {bits}, {group_size_in_words(q.group_size)}{inputs}, format {q.format}; "
        f"mode {execution.mode}, {rounds}; calibration {most} of {calibration.text_in_words}"
    )


def coverage_lines(coverage: "Coverage | None") -> list[str]:
    """Say how much is quantized, and what is not.

    Args:
        coverage: Count of the weights; None where they were not counted.
    """
    if coverage is None:
        return []
    parts = (coverage.in_words, coverage.copied_in_words)
    return [sentence(part) for part in parts if part]


def status_lines(status: "Status") -> list[str]:
    """Describe how far a run is.

    Args:
        status: State of the run.
    """
    time_left = f", about {in_words(status.seconds_left)} left" if status.seconds_left is not None else ""
    workers = "" if status.state == "complete" else f"; {counted(status.workers, 'worker')} up"
    lines = [
        f"{status.state}{', but damaged' if status.damaged else ''}: {status.blocks.done} of {status.blocks.total} "
        f"blocks, {status.units.done} of {status.units.total} units done{time_left}{workers}"
    ]
    if status.damaged:
        first, more = ", ".join(status.damaged[:_NAMED_FILES]), len(status.damaged) - _NAMED_FILES
        lines.append(
            f"damaged: {first}{f' and {more} more' if more > 0 else ''} (gone, or of another size than was written, or "
            "a record that cannot be read); `quantize` of the same version makes them anew"
        )
    words = status.words
    for doing in status.in_flight:
        lines.append(f"in flight: {words.unit(doing.unit)} on worker {doing.worker} for {doing.seconds} s")
    for retry in status.retries:
        unit = words.unit(retry.unit)
        lines.append(f"retried: {unit}, {retry.method} on worker {retry.worker} ({retry.kind}): {retry.cause}")
    for mended in status.mended:
        lines.append(f"found damaged: {words.unit(mended.unit)}: {mended.reason}")
    for failure in status.upload_failures:
        lines.append(f"upload failed: {failure.cause}")
    for place in status.publish:
        commit = f"published as commit {place.commit[:12]}" if place.commit else "not published yet"
        lines.append(f"{place.place}: holds {place.files} of {place.total} files, {commit}")
    return [*lines, *fallback_lines(status.fallbacks, status.min_tokens)]


def publication_line(published: "PublishedModel") -> str:
    """Describe where a model was published.

    Args:
        published: Where the model is.
    """
    return f"Published: {published.url}, commit {published.commit[:12]}, {published.num_files} files"


def verification_lines(verification: "Verification", against: str | None, show_all: bool = False) -> list[str]:
    """Describe what was checked of a model.

    Args:
        verification: What was checked.
        against: Source that each layer was compared with; None where there was none.
        show_all: Whether to show the weight error of every layer, and not only the largest.
    """
    lines = []
    if errors := verification.relative_weight_errors:
        ranked = sorted(errors.items(), key=lambda item: -item[1])
        shown = ranked if show_all else ranked[:_NAMED_LAYERS]
        which = "" if len(shown) == len(ranked) else f", the {len(shown)} largest of {len(ranked)} (--all shows all)"
        lines = [
            f"Weight errors ‖ŵ − w‖ / ‖w‖, w of {against}{which}; usual at 4 bits is 0.1 to 0.2, and "
            "twice that with one bit less:",
            *(f"{name}: {error:.5f}" for name, error in shown),
            f"mean {sum(errors.values()) / len(errors):.5f}, largest {ranked[0][1]:.5f}",
        ]
    compared = ", every file has the SHA-256 that it was written with" if verification.checksums_compared else ""
    tensors = f"{verification.num_tensors} tensors"
    if unsound := verification.not_finite:
        lines.append(
            f"note: {counted(len(unsound), 'tensor')} that the model's class does not read, with NaN or Inf, "
            f"the first is {unsound[0]}; a mask may hold them, but a drafter for speculation that does is damaged"
        )
    if verification.cache_scales:
        lines.append(f"{counted(verification.cache_scales, 'scale')} of an FP8 cache of keys and values")
    if verification.inputs is not None:
        lines.append(f"config.json tells servers to round the inputs of packed layers: {verification.inputs.in_words}")
    corrections = f", {counted(verification.num_corrections, 'correction')} of low rank"
    beside = corrections if verification.num_corrections else ""
    return [*lines, f"{verification.num_linears} packed layers{beside} and {tensors} are sound{compared}"]


def fallback_lines(fallbacks: "Fallbacks", min_tokens: int) -> list[str]:
    """Name the layers that could not be quantized just as the configuration asks.

    Args:
        fallbacks: Those layers.
        min_tokens: Number of calibration tokens below which an expert's statistics are not used.
    """
    return [
        *(f"fallback: the damping of {layer} had to be raised" for layer in fallbacks.damping_raised),
        *(
            f"fallback: {policy} for {counted(len(layers), 'layer')} of experts that fewer than {min_tokens} "
            f"calibration tokens reached (experts.min_tokens: {min_tokens}), e.g. {layers[0]}"
            for policy, layers in fallbacks.experts.items()
        ),
    ]
