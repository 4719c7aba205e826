"""The tensors of a quantized block as its file holds them, and back to the source's own names and layouts.

In a shard every quantized layer is a linear layer of its own, whatever the source has: experts that the source holds
fused in one parameter lie apart, weights that it holds transposed are turned, and the bias of an expert is a tensor of
its own. All other tensors of the block stay as they are.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from astro.config import LayerScheme
from astro.formats import Layout
from astro.model.linear_layer import LinearLayer
from astro.quantization.grid import QuantizedLinear

__all__ = ["kept_keys", "pack_block", "unpack_block"]


def kept_keys(layers: Sequence[LinearLayer], keys: Iterable[str]) -> list[str]:
    """Return the source tensors of a block that go into its shard: all but the weights that are quantized.

    Args:
        layers: The quantized layers of the block.
        keys: Names of all source tensors of the block.
    """
    weights = {layer.key for layer in layers}
    return [key for key in keys if key not in weights]


def pack_block(
    layout: Layout,
    layers: Sequence[LinearLayer],
    quantized_: dict[str, QuantizedLinear],
    kept: Mapping[str, torch.Tensor],
    scale_dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Return the tensors of a block's shard by checkpoint name.

    Args:
        layout: The layout that stores the quantized layers.
        layers: The quantized layers of the block.
        quantized_: Integers and grid of each layer by its name. They are taken out one by one, so that memory never
            holds all of a block twice.
        kept: The source tensors that `kept_keys` names.
        scale_dtype: Dtype in which scales are stored; all scales are exact in it.
    """
    fused_biases = {layer.bias for layer in layers if layer.bias}
    tensors = {key: tensor for key, tensor in kept.items() if key not in fused_biases}
    for layer in layers:
        tensors |= layout.pack_linear(layer.stem, quantized_.pop(layer.name), scale_dtype)
        if layer.bias:
            tensors[f"{layer.stem}.bias"] = layer.stored_bias(kept[layer.bias]).contiguous()
    return tensors


def unpack_block(
    layout: Layout,
    layers: Sequence[LinearLayer],
    tensors_: dict[str, torch.Tensor],
    schemes: Mapping[str, LayerScheme],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Return a block's tensors under the source's names and in its layouts, quantized layers with their new weights.

    Args:
        layout: The layout that stores the quantized layers.
        layers: The quantized layers of the block.
        tensors_: The tensors of the shard by checkpoint name. Packed ones are taken out as they are read.
        schemes: Bits, group size and symmetry that each layer was written with, by its name.
        shapes: Sizes of every source tensor of the block by its name.
        dtype: Dtype of the weights that are returned.

    Raises:
        CheckpointError: A packed tensor is missing or does not fit the others.
    """
    for layer in layers:
        weight = layout.unpack_linear(layer.stem, tensors_, schemes[layer.name]).dequantize()
        for suffix in layout.suffixes(schemes[layer.name]):
            del tensors_[f"{layer.stem}.{suffix}"]
        if layer.key not in tensors_:
            tensors_[layer.key] = torch.empty(shapes[layer.key], dtype=dtype)
        layer.stored(tensors_[layer.key]).copy_(weight)
        if layer.bias:
            bias = tensors_.pop(f"{layer.stem}.bias")
            if layer.bias not in tensors_:
                tensors_[layer.bias] = bias.new_empty(shapes[layer.bias])
            layer.stored_bias(tensors_[layer.bias]).copy_(bias)
    return {key: tensors_[key] for key in shapes}
