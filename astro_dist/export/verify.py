"""Re-read a written model and compare it with what its own config promises and its loaders ask for."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from astro.config import LayerScheme
from astro.errors import CheckpointError, InputError
from astro.formats import LAYOUTS, Layout
from astro.model.linear_layer import LinearLayer
from astro.model.skeleton import Skeleton
from astro.storage.atomic import read_json
from astro.storage.checkpoint import Checkpoint, require_finite
from astro_dist.config.schema import ModelConfig
from astro_dist.export.inventory import ModelFile, describe, read_inventory
from astro_dist.run_directory.identity import read_identity
from astro_dist.run_directory.layout import RunLayout
from astro_dist.run_directory.records import RunDirectory
from astro_dist.source.resolve import Source, resolve_source

__all__ = ["verify_model"]


def verify_model(model: Path | str, against: Path | str | None = None) -> dict[str, Any]:
    """Check a quantized model.

    Every parameter of the model's transformers class has its tensor, or is a linear layer with all of its packed
    tensors in the right shapes; every float is finite and no scale zero; no layer is there twice. In a run directory
    every file has the SHA-256 that it was written with.

    Args:
        model: folder of a quantized model, or ORG/NAME[@REVISION] of one on the Hub, which is read by ranges.
        against: its source, as `model.source` names it; then each layer's ‖Ŵ − W‖_F / ‖W‖_F is measured too.

    Returns:
        Counts, and the errors by layer.

    Raises:
        CheckpointError: naming the first thing that is wrong.
    """
    opened = _resolve(str(model))
    root = opened.folder.resolve().parent
    layout = RunLayout(root)
    is_of_run = not opened.is_remote and layout.identity.is_file() and opened.folder.resolve() == layout.model
    if is_of_run:
        _require_as_written(root)
    checkpoint, folder = Checkpoint.open(opened.store), opened.folder
    require_finite(checkpoint)
    skeleton = Skeleton(folder, torch.float32)
    source = Checkpoint.open(resolve_source(ModelConfig(source=str(against))).store) if against else None
    path = folder / "config.json"
    config = read_json(path, "a checkpoint folder must hold it").get("quantization_config")
    packed = LAYOUTS.get(str(config.get("quant_method"))) if isinstance(config, dict) else None
    if config is None:
        raise CheckpointError(f"{path}: has no quantization_config, so this is no quantized model")
    if packed is None:
        raise CheckpointError(f"{path}: its quantization_config is of no layout known here: {config!r:.80}")
    mark = f".{packed.MARK}"
    stems = {key.removesuffix(mark) for key in checkpoint.entries if key.endswith(mark)}
    layers, unpacked = _layers(checkpoint, skeleton, stems)
    try:
        settings = packed.read_schemes(config, [layer.name for layer in layers])
        missing = [name for name in unpacked if not packed.is_ignored(config, name)]
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its quantization_config is incomplete: {error!r}") from error
    if missing:
        raise CheckpointError(
            f"{checkpoint.store}: {missing[0]} is neither packed nor in the config's ignore list; loaders would "
            "look for its packed tensors"
        )
    originals = _originals(source, skeleton) if source else {}
    errors = {}
    held: dict[str, torch.Tensor] = {}  # the source's tensor that the last layer was part of
    for layer in layers:
        W_hat = _check_linear(checkpoint, packed, layer, settings[layer.name])
        if source:
            errors[layer.stem] = _weight_error(source, originals.get(layer.stem), layer.stem, W_hat, held)
    return {
        "model": str(opened.store),
        "linears": len(layers),
        "tensors": len(checkpoint.entries),
        "checksums_compared": is_of_run,
        "relative_weight_errors": errors,
    }


def _require_as_written(root: Path) -> None:
    """Compare every file of a run's model with what the run wrote.

    Raises:
        CheckpointError: the run is not finished, or a file is not as it was written.
    """
    run = RunDirectory(root, read_identity(root).key)
    folder = run.model
    if not run.inventory.is_file():
        raise CheckpointError(f"{folder}: its run is not finished; `astro-dist status {run.root}` tells how far it is")
    files = read_inventory(run)
    wrong = [file.name for file in files if not _is_there(folder / file.name, file)]
    if wrong:
        raise CheckpointError(
            f"{folder / wrong[0]}: is gone, or is not as the run wrote it (size and SHA-256 in {run.inventory.name}); "
            f"in all {len(wrong)} of {len(files)} files. `astro-dist quantize` with the run's configuration, of the "
            "same version, makes them anew"
        )


def _is_there(path: Path, file: ModelFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size_bytes and describe(path) == file


def _resolve(model: str) -> Source:
    name, _, revision = model.partition("@")
    if Path(model).expanduser().exists() or not revision:
        return resolve_source(ModelConfig(source=model))
    return resolve_source(ModelConfig(source=name, revision=revision))


def _layers(checkpoint: Checkpoint, skeleton: Skeleton, stems: set[str]) -> tuple[list[LinearLayer], list[str]]:
    """The packed layers, and the names of linear layers that are not.

    Raises:
        CheckpointError: the model and the tensors do not fit each other.
    """
    for stem in sorted(stems):
        if f"{stem}.weight" in checkpoint.entries:
            raise CheckpointError(f"{checkpoint.store}: {stem}.weight is there beside its packed tensors")
    loose = {key: skeleton.target_of(key) for key in checkpoint.entries if not _is_packed(key, stems)}
    for key, (target, conversion) in loose.items():
        shape, expected = checkpoint.entries[key].shape, skeleton.shape_of(target)
        if conversion is None and expected is not None and shape != expected:
            raise CheckpointError(f"{checkpoint.store}: {key} should be {list(expected)}, got {list(shape)}")
    weights = [f"{stem}.weight" for stem in stems]
    skeleton.require_covered({target for target, _ in (*loose.values(), *map(skeleton.target_of, weights))})
    found = _found(checkpoint, skeleton, [*loose, *weights])
    layers = [layer for layer in found if layer.stem in stems]
    packed = {layer.name for layer in layers}
    modules = (name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Linear))
    names = dict.fromkeys((*modules, *(layer.name for layer in found)))
    return layers, [name for name in names if name not in packed]


def _found(checkpoint: Checkpoint, skeleton: Skeleton, keys: Iterable[str] | None = None) -> list[LinearLayer]:
    """The linear layers that some tensors of a checkpoint, or all, are the weights of."""
    by_block: dict[int | None, list[str]] = {}
    for key in checkpoint.entries if keys is None else keys:
        by_block.setdefault(skeleton.block_of(skeleton.target_of(key)[0]), []).append(key)
    layers = [
        layer
        for index in range(len(skeleton.blocks))
        for layer in skeleton.linear_layers(index, by_block.get(index, []))[0]
    ]
    for key in by_block.get(None, []):
        target = skeleton.target_of(key)[0]
        module = skeleton.model.get_submodule(target.rpartition(".")[0]) if skeleton.shape_of(target) else None
        if isinstance(module, nn.Linear) and target.endswith(".weight"):
            layers.append(LinearLayer.plain(target.removesuffix(".weight"), key, *module.weight.shape))
    return layers


def _originals(source: Checkpoint, skeleton: Skeleton) -> dict[str, LinearLayer]:
    """The linear layers of the source by the names under which they are packed."""
    try:
        return {layer.stem: layer for layer in _found(source, skeleton)}
    except CheckpointError as error:
        raise CheckpointError(f"{source.store}: {error}; it is not the source of this model") from error


def _is_packed(key: str, stems: set[str]) -> bool:
    stem, _, suffix = key.rpartition(".")
    return stem in stems and suffix not in ("weight", "bias")


def _check_linear(checkpoint: Checkpoint, packed: Layout, layer: LinearLayer, settings: LayerScheme) -> torch.Tensor:
    """The weights of a packed layer."""
    wanted = [f"{layer.stem}.{suffix}" for suffix in packed.suffixes(settings)]
    tensors = checkpoint.read(name for name in wanted if name in checkpoint.entries)
    linear = packed.unpack_linear(layer.stem, tensors, settings)
    shape = (layer.rows, layer.columns)
    if tuple(linear.Q.shape) != shape:
        raise CheckpointError(
            f"{checkpoint.store}: {layer.stem} is packed as {list(linear.Q.shape)}, the model has {shape}"
        )
    if not bool((linear.grid.scale != 0).all()):
        raise CheckpointError(f"{checkpoint.store}: {layer.stem} has scales that are zero")
    return linear.dequantize()


def _weight_error(
    source: Checkpoint, original: LinearLayer | None, stem: str, W_hat: torch.Tensor, held: dict[str, torch.Tensor]
) -> float:
    if original is None:
        raise CheckpointError(f"{source.store}: has no tensor for {stem}; it is not the source of this model")
    if original.key not in held:
        held.clear()
        held |= source.read([original.key])
    W = original.stored(held[original.key]).float()
    if W.shape != W_hat.shape:
        raise CheckpointError(
            f"{source.store}: {original.key} is {list(W.shape)}, the quantized layer {list(W_hat.shape)}"
        )
    return float(torch.linalg.vector_norm(W_hat - W) / torch.linalg.vector_norm(W).clamp(min=1e-30))
