"""The weights of a quantized model, as our reader unpacks them, in a plain checkpoint like that of the source."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from astro.formats import LAYOUTS
from astro.formats.block_shard import packed_keys, unpack_layer
from astro.model.linear_layer import LinearLayer
from astro.model.skeleton import Skeleton
from astro.storage.atomic import read_json, write_json
from astro.storage.checkpoint import Checkpoint

__all__ = ["keys_of", "write_dequantized"]


def keys_of(skeleton: Skeleton, checkpoint: Checkpoint, index: int) -> list[str]:
    """Return the names of the checkpoint's tensors that belong to a block."""
    return [key for key in checkpoint.entries if skeleton.block_of(skeleton.target_of(key)[0]) == index]


def write_dequantized(source: Path, quantized: Path, target: Path) -> int:
    """Write the source in float32 with the weights of the quantized layers in it, and return the number of layers."""
    checkpoint, result, skeleton = Checkpoint.open(source), Checkpoint.open(quantized), Skeleton(source, torch.float32)
    layers: list[LinearLayer] = []
    for index in range(len(skeleton.blocks)):
        layers += skeleton.linear_layers(index, keys_of(skeleton, checkpoint, index))[0]
    config = read_json(quantized / "config.json")["quantization_config"]
    layout = LAYOUTS[config["quant_method"]]
    layers = [layer for layer in layers if f"{layer.stem}{layer.joint}{layout.MARK}" in result.entries]
    names = {layer.config_names[0]: layer.name for layer in layers}
    schemes = {
        names[name]: scheme for name, scheme in layout.read_schemes(config, list(names)).items() if name in names
    }
    tensors = checkpoint.read(checkpoint.entries)
    tensors |= result.read(set(tensors) & set(result.entries))  # a norm may have taken factors of an input
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    for layer in layers:
        keys = packed_keys(layout, layer, schemes[layer.name]).values()
        linear = unpack_layer(layout, layer, result.read(keys), schemes[layer.name])
        layer.stored(tensors[layer.key]).copy_(linear.dequantize())
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"), dirs_exist_ok=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    write_json(target / "config.json", read_json(source / "config.json"))
    return len(layers)
