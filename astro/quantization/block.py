"""One transformer block: its forward, the quantization of its linear layers.

Shapes: B sequences, T tokens, H hidden size.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch

from astro.calibration.starved_experts import InputStatistics, exhaust
from astro.config import Quantization, Regularizer
from astro.linalg.batching import batches, stacked
from astro.quantization.grid import QuantizedLinear
from astro.quantization.input_group import quantize_groups
from astro.quantization.layer_record import LayerRecord

__all__ = ["apart", "quantize_block", "side_by_side"]


def quantize_block(
    weights: Mapping[str, torch.Tensor],
    groups: Sequence[Sequence[str]],
    statistics: Iterable[InputStatistics],
    quantization: Mapping[str, Quantization],
    regularization: Regularizer,
    scale_dtype: torch.dtype,
    widths: Sequence[int] = (),
) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
    """Quantize every linear layer of a block.

    Args:
        weights: original weight [R, C] of each layer by name, on the device of the statistics.
        groups: names of the layers that share an input.
        statistics: of every group, in their order; taken as they are needed.
        quantization: grid and solver of each layer by name.
        regularization: what is done to the weights before.
        scale_dtype: dtype in which scales are stored.
        widths: that are measured besides.

    Returns:
        Each layer on its grid by name, and one record a group.
    """
    quantized: dict[str, QuantizedLinear] = {}
    records: list[LayerRecord] = []
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    device_type = next(iter(weights.values())).device.type if weights else "cpu"
    remaining = iter(statistics)
    for batch in side_by_side(groups, shapes, quantization, device_type):
        known = list(itertools.islice(remaining, len(batch)))
        H, tokens = stacked([own.H for own in known]), [own.num_tokens for own in known]
        rounded = [own.fallback == "rtn" for own in known]
        counted = [(own.routed_tokens, own.fallback) for own in known]
        del known  # a wide layer's matrices are gigabytes
        for settings, stacks in apart([groups[i] for i in batch], quantization):
            layers = [{name: weights[name] for name in members} for members in stacks]
            solved, own = quantize_groups(layers, H, tokens, settings, regularization, scale_dtype, widths, rounded)
            quantized |= solved
            for record, (routed, fallback) in zip(own, counted, strict=True):
                records.append(dataclasses.replace(record, routed_tokens=routed, fallback=fallback))
        del H
    exhaust(remaining)
    return quantized, records


def side_by_side(
    groups: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, int]],
    quantization: Mapping[str, Quantization],
    device_type: str,
) -> list[range]:
    """Which groups are solved side by side: neighbours of one shape with the same settings.

    Args:
        groups: names of the layers that share an input.
        shapes: rows and columns of each layer.
        quantization: grid and solver of each layer by name.
        device_type: "cpu" or "cuda".

    Returns:
        Indices of the groups of each batch, in order.
    """
    kinds = []
    for names in groups:
        members = tuple((quantization[name], shapes[name]) for name in names)
        kinds.append((members, sum(rows for _, (rows, _) in members), shapes[names[0]][1]))
    return batches(kinds, device_type)


def apart(
    groups: Sequence[Sequence[str]], quantization: Mapping[str, Quantization]
) -> list[tuple[Quantization, list[list[str]]]]:
    """Groups that are solved side by side, apart where overrides give members of each different grids.

    Args:
        groups: names of the layers that share an input; alike in all settings.
        quantization: grid and solver of each layer by name.
    """
    own = [quantization[name] for name in groups[0]]
    different = [settings for i, settings in enumerate(own) if settings not in own[:i]]
    return [
        (settings, [[name for name in names if quantization[name] == settings] for names in groups])
        for settings in different
    ]
