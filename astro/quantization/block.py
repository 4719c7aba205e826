"""One transformer block: the quantization of its linear layers, one input group after the other."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch

from astro.calibration import input_sums
from astro.calibration.starved_experts import InputStatistics, exhaust
from astro.config import LayerScheme
from astro.linalg.batching import batches, stacked, stacked_padded
from astro.quantization.grid import QuantizedLinear
from astro.quantization.input_group import quantize_input_groups
from astro.quantization.layer_record import LayerRecord
from astro.quantization.recipe import InputMoments, Recipe

__all__ = ["COUNTED", "apart", "quantize_block", "side_by_side"]

COUNTED = ("routed_tokens", "token_weights", "gradient_energy", "fallback")
"""What a layer's record takes over from the statistics of its inputs."""


def quantize_block(
    weights: Mapping[str, torch.Tensor],
    input_groups: Sequence[Sequence[str]],
    statistics: Iterable[InputStatistics],
    schemes: Mapping[str, LayerScheme],
    recipe: Recipe,
    widths: Sequence[int] = (),
) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
    """Quantize every linear layer of a block.

    Args:
        weights: Original weight [R, C] of each layer by name, on the device of the statistics.
        input_groups: Names of the layers that share an input, for each input.
        statistics: Statistics of every input group, in their order; they are taken as they are needed.
        schemes: The grid of each layer by name.
        recipe: How the layers are quantized.
        widths: Widths that are measured besides.

    Returns:
        Each layer on its grid by name, and one record an input group.
    """
    quantized: dict[str, QuantizedLinear] = {}
    records: list[LayerRecord] = []
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    tile_elements = recipe.tile_elements_on(next(iter(weights.values())).device) if weights else 1
    remaining = iter(statistics)
    for batch in side_by_side(input_groups, shapes, schemes, tile_elements):
        of_batch = list(itertools.islice(remaining, len(batch)))
        H, tokens = stacked([inputs.H for inputs in of_batch]), [inputs.num_tokens for inputs in of_batch]
        moments = InputMoments(
            H,
            stacked_padded([inputs.drift for inputs in of_batch], H.shape[-1]),
            [inputs.fallback == "rtn" for inputs in of_batch],
            input_sums.side_by_side([inputs.rounding for inputs in of_batch], H.shape[-1]),
            stacked_padded([inputs.spread for inputs in of_batch], H.shape[-1]),
        )
        counted = [{figure: getattr(inputs, figure) for figure in COUNTED} for inputs in of_batch]
        del of_batch  # a wide layer's matrices are gigabytes
        for scheme, stacks in apart([input_groups[i] for i in batch], schemes):
            layers = [{name: weights[name] for name in members} for members in stacks]
            solved, solved_records = quantize_input_groups(layers, moments, tokens, scheme, recipe, widths)
            quantized |= solved
            for record, figures in zip(solved_records, counted, strict=True):
                records.append(dataclasses.replace(record, **figures))
        del H, moments
    exhaust(remaining)
    return quantized, records


def side_by_side(
    input_groups: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, int]],
    schemes: Mapping[str, LayerScheme],
    tile_elements: int,
) -> list[range]:
    """Find which input groups are solved side by side: neighbours of one shape with the same grids.

    Args:
        input_groups: Names of the layers that share an input, for each input.
        shapes: Rows and columns of each layer by name.
        schemes: The grid of each layer by name.
        tile_elements: Weights of a tile.

    Returns:
        Indices of the input groups of each batch, in order.
    """
    kinds = []
    for names in input_groups:
        members = tuple((schemes[name], shapes[name]) for name in names)
        kinds.append((members, sum(rows for _, (rows, _) in members), shapes[names[0]][1]))
    return batches(kinds, tile_elements)


def apart(
    input_groups: Sequence[Sequence[str]], schemes: Mapping[str, LayerScheme]
) -> list[tuple[LayerScheme, list[list[str]]]]:
    """Take input groups that are solved side by side apart where members of each have different grids.

    Args:
        input_groups: Names of the layers that share an input, for each input; alike in all grids.
        schemes: The grid of each layer by name.

    Returns:
        Each grid, with the members of every input group that have it.
    """
    different = list(dict.fromkeys(schemes[name] for name in input_groups[0]))
    return [
        (scheme, [[name for name in names if schemes[name] == scheme] for names in input_groups])
        for scheme in different
    ]
