"""The bars of a report: the layers with the largest errors, and those that are predicted to cost most."""

import dataclasses
from collections.abc import Sequence

from astro.quantization.layer_record import LayerRecord
from astro_dist.wording import percent

__all__ = ["Bar", "costly_layers", "short_name", "worst_layers"]

_SHOWN = 10
"""Number of layers that are shown."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar shows a figure of layers that were solved together.

    Attributes:
        name: Names of the layers, shortened.
        full_name: Names of the layers.
        share: Length of the bar as a share of the longest.
        figure: Figure, in words.
        details: What else is known of the layers, in words.
    """

    name: str
    full_name: str
    share: float
    figure: str
    details: str


def worst_layers(layers: Sequence[LayerRecord]) -> list[Bar]:
    """Show the layers with the largest relative errors, the largest first.

    Args:
        layers: Records of all layers.
    """
    most = sorted(layers, key=lambda layer: -layer.relative_error)[:_SHOWN]
    longest = max((layer.relative_error for layer in most), default=0.0) or 1.0
    errors = [layer.relative_error for layer in most]
    return [_bar(layer, e / longest, f"{e:.3g}", _choice(layer)) for layer, e in zip(most, errors, strict=True)]


def costly_layers(layers: Sequence[LayerRecord]) -> list[Bar]:
    """Show the layers that are predicted to cost most; none where that is not known.

    Args:
        layers: Records of all layers.
    """
    nats = {layer.name: layer.predicted_nats or 0.0 for layer in layers}
    total = sum(nats.values())
    most = [layer for layer in sorted(layers, key=lambda layer: -nats[layer.name])[:_SHOWN] if nats[layer.name] > 0]
    return [
        _bar(
            layer,
            nats[layer.name] / nats[most[0].name],
            f"{nats[layer.name]:.2g}",
            f"{percent(nats[layer.name] / total, 1)} of all layers, {_bits(layer)}, error {layer.relative_error:.3g}",
        )
        for layer in most
    ]


def short_name(layer: LayerRecord) -> str:
    """Return the names of layers that were solved together: the first in full, of the others the last part.

    Args:
        layer: Record of the layers.
    """
    first, *others = layer.members
    return " + ".join([first, *(other.rpartition(".")[2] for other in others)])


def _bar(layer: LayerRecord, share: float, figure: str, details: str) -> Bar:
    return Bar(short_name(layer), " + ".join(layer.members), share, figure, details)


def _choice(layer: LayerRecord) -> str:
    parts = [_bits(layer), f"β {layer.beta:g}" if layer.beta else "not regularized"]
    if layer.beta_gain:
        parts.append(f"which saved {percent(layer.beta_gain, 1)}")
    if layer.fallback:
        parts.append(f"fallback {layer.fallback}, {layer.routed_tokens:,} routed tokens")
    return ", ".join(parts)


def _bits(layer: LayerRecord) -> str:
    return f"{layer.bits} bits"
