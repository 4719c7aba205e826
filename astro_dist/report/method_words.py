"""How a run quantized, in sentences for a person: the strength β, the weights of tokens, and widths."""

import statistics
from collections import Counter
from collections.abc import Sequence

from astro.quantization.layer_record import LayerRecord
from astro_dist.config.schema import RunConfig
from astro_dist.report.findings import Findings
from astro_dist.wording import counted, percent, sentence

__all__ = ["method_sentences"]

_NAMES = {"astro": "Astro", "magr": "MagR"}
_MEASURES = {"nats": "the nats that each layer is predicted to cost", "relative error": "relative layer errors"}
_MOST_STRENGTHS = 6
"""Number of different strengths that are listed one by one."""


def method_sentences(findings: Findings) -> list[str]:
    """Describe how the layers were quantized; empty where none is, or where the configuration cannot be read.

    Args:
        findings: What the run directory says.
    """
    layers, config = findings.layers, findings.config
    if not layers or config is None:
        return []
    sentences = [_strength(config, layers), _tokens(config, layers, findings.effective_tokens)]
    if findings.summary is not None:
        coverage, widths_by = findings.summary.coverage, findings.summary.widths_by
        if widths_by:
            sentences.append(f"Widths were chosen by {_MEASURES[widths_by]}.")
        tuning, corrections = findings.summary.tuning, findings.summary.corrections
        parts = [part.in_words for part in (tuning, corrections) if part is not None]
        parts += [coverage.in_words, coverage.copied_in_words] if coverage else []
        sentences += [f"{sentence(part)}." for part in parts if part]
        rule = config.activations.smoothing
        sentences += [f"Smoothed inputs ({rule}): {kind.in_words}." for kind in findings.summary.smoothing]
    return sentences


def _strength(config: RunConfig, layers: Sequence[LayerRecord]) -> str:
    name = config.regularizer.name
    if name == "none":
        return "Weights were not regularized before they were rounded."
    if not config.regularizer.is_searched:
        return f"{_NAMES[name]} regularized every layer with the strength β {config.regularizer.beta:g}."
    counts = sorted(Counter(layer.beta for layer in layers).items())
    groups = f"{counted(len(layers), 'group')} of layers that read one input"
    where = f"{_NAMES[name]}'s strength β was chosen by measurement for {groups}"
    if len(counts) <= _MOST_STRENGTHS:
        shown = ", ".join(f"{f'{beta:g}' if beta else '0 (no regularization)'} for {count:,}" for beta, count in counts)
    else:
        betas = [layer.beta for layer in layers]
        shown = f"from {min(betas):g} to {max(betas):g}, the median is {statistics.median_low(betas):g}"
    gains = [layer.beta_gain for layer in layers if layer.beta]
    if not gains:
        return f"{where}: {shown}."
    saved = percent(statistics.median(gains), 1)
    return f"{where}: {shown}. Where it is not 0, it saved a median of {saved} of the layer error."


def _tokens(config: RunConfig, layers: Sequence[LayerRecord], effective: Sequence[float]) -> str:
    tokens = max(layer.num_tokens for layer in layers)
    match config.calibration.token_weights:
        case "none":
            return f"All {tokens:,} calibration tokens count alike."
        case "norm":
            return f"{tokens:,} calibration tokens were weighted by their norm: each has the same energy at a layer."
    told = f"{tokens:,} calibration tokens were weighted by how much the loss depends on each of them"
    if effective:
        told += f"; so they say as much as {statistics.median(effective):,.0f} of equal weight (median of groups)"
    others = sum(layer.token_weights == "norm" for layer in layers)
    if not others:
        return f"{told}."
    return f"{told}. In {counted(others, 'group')} this could not be measured, and they were weighted by their norm."
