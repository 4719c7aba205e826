"""One transformer block: its forward, the quantization of its linear layers.

Shapes: B sequences, T tokens, H hidden size.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from astro.config import Quantization, Regularizer
from astro.expert_policy import GroupStatistics, rounded
from astro.layer import QuantizedLinear, quantize_group
from astro.recording import BlockCall
from astro.report import LayerRecord

__all__ = ["by_settings", "forward", "quantize_block"]


def forward(block: nn.Module, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
    """The block's output hidden states [B, T, H] for input hidden states [B, T, H]."""
    output = block(hidden, *call.args, **call.kwargs)
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


def quantize_block(
    weights: Mapping[str, torch.Tensor],
    statistics: Iterable[GroupStatistics],
    quantization: Mapping[str, Quantization],
    regularization: Regularizer,
    scale_dtype: torch.dtype,
    widths: Sequence[int] = (),
) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
    """Quantize every linear layer of a block.

    Args:
        weights: original weight [R, C] of each layer by name, on the device of the statistics.
        statistics: of every group.
        quantization: grid and solver of each layer by name.
        regularization: what is done to the weights before.
        scale_dtype: dtype in which scales are stored.
        widths: that are measured besides.

    Returns:
        Each layer on its grid by name, and one record a group.
    """
    quantized: dict[str, QuantizedLinear] = {}
    records = []
    for known in statistics:
        for settings, members in by_settings(known.names, quantization):
            group = [(name, weights[name]) for name in members]
            own = rounded(settings, regularization) if known.fallback == "rtn" else (settings, regularization)
            solved, record = quantize_group(group, known.H, known.num_tokens, *own, scale_dtype, widths)
            quantized.update(solved)
            records.append(dataclasses.replace(record, routed_tokens=known.routed_tokens, fallback=known.fallback))
    return quantized, records


def by_settings(names: Sequence[str], quantization: Mapping[str, Quantization]) -> list[tuple[Quantization, list[str]]]:
    """Layers that share an input, apart where an override gives them different grids."""
    groups: list[tuple[Quantization, list[str]]] = []
    for name in names:
        found = next((members for settings, members in groups if settings == quantization[name]), None)
        if found is None:
            groups.append((quantization[name], [name]))
        else:
            found.append(name)
    return groups
