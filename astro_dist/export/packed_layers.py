"""Which layers of a written model are packed, and in which layout: what every reader of a result begins with."""

from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

from torch import nn

from astro.errors import CheckpointError
from astro.formats import LAYOUTS, Layout
from astro.model.linear_layer import LinearLayer
from astro.model.skeleton import Skeleton
from astro.storage.atomic import read_json
from astro.storage.checkpoint import Checkpoint

__all__ = ["is_of_packed", "is_packed", "linear_layers", "packed_layers", "read_packing"]


def read_packing(path: Path) -> tuple[Layout, dict[str, Any]]:
    """Read the layout of a model and its quantization_config from its config.json.

    Args:
        path: Path of the model's config.json.

    Raises:
        CheckpointError: The model is not quantized, or in a layout that is not known.
    """
    config = read_json(path, "a checkpoint folder must hold it").get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else config
    packing = LAYOUTS.get(str(method))
    if config is None:
        raise CheckpointError(f"{path}: has no quantization_config, so this is no quantized model")
    if packing is None:
        raise CheckpointError(
            f"{path}: its quantization_config has quant_method {method!r:.80}; expected a result of "
            f"astro-dist, which has {' or '.join(LAYOUTS)}"
        )
    return packing, config


def packed_layers(checkpoint: Checkpoint, skeleton: Skeleton, stems: Set[str]) -> tuple[list[LinearLayer], list[str]]:
    """Return the packed layers, and the names of the linear layers that are not packed.

    Args:
        checkpoint: Checkpoint of the model, tensors as they are stored.
        skeleton: The model on the meta device.
        stems: Stems of the packed layers, see `stem_of`.

    Raises:
        CheckpointError: The model and the tensors do not fit each other.
    """
    for stem in sorted(stems):
        if f"{stem}.weight" in checkpoint.entries:
            raise CheckpointError(f"{checkpoint.store}: {stem}.weight is there beside its packed tensors")
    loose = {key: skeleton.target_of(key) for key in checkpoint.entries if not is_packed(key, stems)}
    for key, (target, conversion) in loose.items():
        shape, expected = checkpoint.entries[key].shape, skeleton.shape_of(target)
        if conversion is None and expected is not None and shape != expected:
            raise CheckpointError(f"{checkpoint.store}: {key} should be {list(expected)}, got {list(shape)}")
    weights = [f"{stem}.weight" for stem in stems]
    skeleton.require_covered({target for target, _ in (*loose.values(), *map(skeleton.target_of, weights))})
    linears = linear_layers(checkpoint, skeleton, [*loose, *weights])
    layers = [layer for layer in linears if layer.stem in stems]
    packed = {name for layer in layers for name in layer.config_names}
    modules = (name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Linear))
    names = dict.fromkeys((*modules, *(name for layer in linears for name in layer.config_names)))
    return layers, [name for name in names if name not in packed]


def linear_layers(checkpoint: Checkpoint, skeleton: Skeleton, keys: Iterable[str] | None = None) -> list[LinearLayer]:
    """Find the linear layers whose weights are among some tensors of a checkpoint, or among all of them.

    Args:
        checkpoint: Checkpoint of the model.
        skeleton: The model on the meta device.
        keys: Names of the tensors; a packed layer has the name that its plain weight would have. None for all tensors.
    """
    by_block: dict[int | None, list[str]] = {}
    for key in checkpoint.entries if keys is None else keys:
        by_block.setdefault(skeleton.block_of(skeleton.target_of(key)[0]), []).append(key)
    shapes = {key: entry.shape for key, entry in checkpoint.entries.items()}
    layers = [
        layer
        for index in range(len(skeleton.blocks))
        for layer in skeleton.linear_layers(index, by_block.get(index, []), shapes)[0]
    ]
    for key in by_block.get(None, []):
        target = skeleton.target_of(key)[0]
        module = skeleton.model.get_submodule(target.rpartition(".")[0]) if skeleton.shape_of(target) else None
        if isinstance(module, nn.Linear) and target.endswith(".weight"):
            layers.append(LinearLayer.plain(target.removesuffix(".weight"), key, *module.weight.shape))
    return layers


def is_packed(key: str, stems: Set[str]) -> bool:
    """Tell whether a tensor is one of those that a packed layer is stored as.

    Args:
        key: Name of the tensor.
        stems: Stems of the packed layers.
    """
    return is_of_packed(key, stems) and not key.endswith((".weight", "_weight", ".bias", "_bias"))


def is_of_packed(key: str, stems: Set[str]) -> bool:
    """Tell whether a tensor belongs to a packed layer, its bias included. Joined experts have `_` for the last dot.

    Args:
        key: Name of the tensor.
        stems: Stems of the packed layers.
    """
    parent, _, name = key.rpartition(".")
    return parent in stems or f"{parent}.{name.partition('_')[0]}" in stems
