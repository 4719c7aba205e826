"""The tensors of a quantized block as its file holds them, and back to the source's own names and layouts.

In a shard every quantized layer is a linear layer of its own, whatever the source has: experts that the source holds
fused in one parameter lie apart, weights that it holds transposed are turned, and the bias of an expert is a tensor of
its own. All other tensors of the block stay as they are.

The experts of gpt-oss are stored as vLLM loads them: `experts.E.w13_weight_packed` holds gate and up of expert E, whose
rows alternate, and is joined to its ending by an underscore. There is no `weight_shape` beside it.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from astro.config import LayerScheme
from astro.formats import Layout
from astro.model.linear_layer import LinearLayer
from astro.quantization.grid import QuantizedLinear

__all__ = ["kept_keys", "pack_block", "pack_layer", "packed_keys", "stem_of", "unpack_block", "unpack_layer"]

_UNSERVED = "weight_shape"
"""Ending of a tensor that vLLM's loader of gpt-oss takes for a weight; the layer's sizes follow from the model."""


def kept_keys(layers: Sequence[LinearLayer], keys: Iterable[str]) -> list[str]:
    """Return the source tensors of a block that go into its shard: all but the weights that are quantized.

    Args:
        layers: The quantized layers of the block.
        keys: Names of all source tensors of the block.
    """
    weights = {layer.key for layer in layers}
    return [key for key in keys if key not in weights]


def packed_keys(layout: Layout, layer: LinearLayer, scheme: LayerScheme) -> dict[str, str]:
    """Return the names of the tensors that store a layer, by the ending that the layout gives them.

    Args:
        layout: The layout that stores the layer.
        layer: The layer.
        scheme: Bits, group size and symmetry of the layer.
    """
    stored = (suffix for suffix in layout.suffixes(scheme) if layer.joint == "." or suffix != _UNSERVED)
    return {suffix: f"{layer.stem}{layer.joint}{suffix}" for suffix in stored}


def stem_of(key: str, ending: str) -> str | None:
    """Return the stem of the layer that a packed tensor belongs to; None where the tensor's name ends otherwise.

    Args:
        key: Name of the tensor.
        ending: Ending of the name, without what joins it to the stem.
    """
    return key[: -len(ending) - 1] if key.endswith((f".{ending}", f"_{ending}")) else None


def pack_layer(
    layout: Layout, layer: LinearLayer, linear: QuantizedLinear, scale_dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the tensors that store one layer, by checkpoint name.

    Args:
        layout: The layout that stores the layer.
        layer: The layer.
        linear: Integers and grid of the layer.
        scale_dtype: Dtype in which scales are stored; all scales are exact in it.
    """
    tensors = layout.pack_linear(layer.stem, linear, scale_dtype)
    if layer.joint == ".":
        return tensors
    named = {name.removeprefix(f"{layer.stem}."): tensor for name, tensor in tensors.items()}
    return {f"{layer.stem}{layer.joint}{suffix}": named[suffix] for suffix in named if suffix != _UNSERVED}


def unpack_layer(
    layout: Layout, layer: LinearLayer, tensors: Mapping[str, torch.Tensor], scheme: LayerScheme
) -> QuantizedLinear:
    """Read one layer back.

    Args:
        layout: The layout that stores the layer.
        layer: The layer.
        tensors: Tensors by checkpoint name; those of the layer must be among them.
        scheme: Bits, group size and symmetry that the layer was written with.

    Raises:
        CheckpointError: A packed tensor is missing or does not fit the others.
    """
    if layer.joint == ".":
        return layout.unpack_linear(layer.stem, tensors, scheme)
    keys = packed_keys(layout, layer, scheme)
    named = {f"{layer.stem}.{suffix}": tensors[key] for suffix, key in keys.items() if key in tensors}
    if _UNSERVED in layout.suffixes(scheme):
        named[f"{layer.stem}.{_UNSERVED}"] = torch.tensor([layer.rows, layer.columns])
    return layout.unpack_linear(layer.stem, named, scheme)


def pack_block(
    layout: Layout,
    layers: Sequence[LinearLayer],
    quantized_: dict[str, QuantizedLinear],
    kept: Mapping[str, torch.Tensor],
    scale_dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Return the tensors of a block's shard by checkpoint name: packed ones on the device, all others where they were.

    Args:
        layout: The layout that stores the quantized layers.
        layers: The quantized layers of the block.
        quantized_: Integers and grid of each layer by its name. They are taken out one by one, so that memory never
            holds all of a block twice.
        kept: The source tensors that `kept_keys` names.
        scale_dtype: Dtype in which scales are stored; all scales are exact in it.
        device: Device that packs the layers.
    """
    fused_biases = {layer.bias for layer in layers if layer.bias}
    tensors = {key: tensor for key, tensor in kept.items() if key not in fused_biases}
    for layer in layers:
        tensors |= pack_layer(layout, layer, quantized_.pop(layer.name).to(device), scale_dtype)
        if layer.bias:
            tensors[f"{layer.stem}{layer.joint}bias"] = layer.stored_bias(kept[layer.bias]).contiguous()
    return tensors


def unpack_block(
    layout: Layout,
    schemes: Mapping[LinearLayer, LayerScheme],
    tensors_: dict[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Return a block's tensors under the source's names and in its layouts, quantized layers with their new weights.

    Layers travel to the device as they are packed, and only there become weights.

    Args:
        layout: The layout that stores the quantized layers.
        schemes: Bits, group size and symmetry that each quantized layer of the block was written with.
        tensors_: The tensors of the shard by checkpoint name. Packed ones are taken out as they are read.
        shapes: Sizes of every source tensor of the block by its name.
        dtype: Dtype of the weights that are returned.
        device: Device of the weights that are returned; all other tensors stay where they are.

    Raises:
        CheckpointError: A packed tensor is missing or does not fit the others.
    """
    for layer, scheme in schemes.items():
        keys = packed_keys(layout, layer, scheme).values()
        packed = {key: _moved(tensors_.pop(key), device) for key in keys if key in tensors_}
        linear = unpack_layer(layout, layer, packed, scheme)
        if layer.key not in tensors_:
            tensors_[layer.key] = torch.empty(shapes[layer.key], dtype=dtype, device=device)
        linear.dequantize_into_(layer.stored(tensors_[layer.key]))
        if layer.bias:
            bias = tensors_.pop(f"{layer.stem}{layer.joint}bias")
            if layer.bias not in tensors_:
                tensors_[layer.bias] = bias.new_empty(shapes[layer.bias])
            layer.stored_bias(tensors_[layer.bias]).copy_(bias)
    return {key: tensors_[key] for key in shapes}


def _moved(packed: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a packed tensor to a device, if it is a matrix: sizes and numbers of groups are checked on the host."""
    return packed.to(device) if packed.ndim > 1 else packed
