"""Read a written model again and compare it with what its own config promises and its loaders ask for."""

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from astro.activation_config import ActivationScheme
from astro.config import LayerScheme
from astro.errors import CheckpointError, InputError
from astro.formats import Layout
from astro.formats.block_shard import packed_keys, stem_of, unpack_layer
from astro.model.linear_layer import LinearLayer
from astro.model.skeleton import Skeleton
from astro.model.smoothed_tensors import SmoothedInput, smoothed_layer, smoothed_tensors
from astro.storage.checkpoint import Checkpoint
from astro_dist.config.schema import ModelConfig
from astro_dist.export.adapter_check import checked_adapter
from astro_dist.export.cache_scales import checked_cache_scales
from astro_dist.export.input_scales import read_input_scales
from astro_dist.export.inventory import describe, read_inventory
from astro_dist.export.named_model import find_model
from astro_dist.export.packed_layers import is_of_packed, is_packed, linear_layers, packed_layers, read_packing
from astro_dist.export.smoothing_file import read_smoothing
from astro_dist.planning.unquantized import copied_matrices
from astro_dist.run_directory.identity import read_identity
from astro_dist.run_directory.layout import RunLayout
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.unit_record import FileRecord
from astro_dist.source.long_wait import LongWait
from astro_dist.source.resolve import resolve_source
from astro_dist.source.weight_check import check_weights
from astro_dist.wording import counted

__all__ = ["Verification", "verify_model"]

_log = logging.getLogger("astro_dist")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """A verification tells what was checked of a model that is sound.

    Attributes:
        model: Folder or repository of the model.
        num_linears: Number of packed layers.
        num_tensors: Number of tensors.
        num_corrections: Number of packed layers that the adapter of the model corrects.
        inputs: Grid to which servers round the inputs of packed layers; None where they stay as they are.
        cache_scales: Number of scales of an FP8 cache of keys and values; 0 where config.json asks for none.
        not_finite: Names of the tensors that hold NaN or Inf, and that the model's class does not read. A drafter may.
        checksums_compared: Whether every file was compared with the SHA-256 that the run recorded.
        relative_weight_errors: ‖Ŵ − W‖_F / ‖W‖_F of each layer by name, Ŵ with its correction of low rank; empty where
            no source was given.
    """

    model: str
    num_linears: int
    num_tensors: int
    num_corrections: int
    inputs: ActivationScheme | None
    cache_scales: int
    not_finite: tuple[str, ...]
    checksums_compared: bool
    relative_weight_errors: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the verification as a JSON object."""
        return {
            "model": self.model,
            "linears": self.num_linears,
            "tensors": self.num_tensors,
            "corrections": self.num_corrections,
            "cache_scales": self.cache_scales,
            "inputs": None if self.inputs is None else self.inputs.in_words,
            "not_finite": list(self.not_finite),
            "checksums_compared": self.checksums_compared,
            "relative_weight_errors": dict(self.relative_weight_errors),
        }


def verify_model(model: Path | str, against: Path | str | None = None, trust_remote_code: bool = False) -> Verification:
    """Check a quantized model.

    The model is built as the class that `architectures` in its config.json names. Every parameter that text needs has
    its tensor, or is a linear layer with all of its packed tensors in the right shapes; every float that it reads is
    finite and no scale zero; no layer is there twice. Every matrix that is not packed, known to that class or not, is
    named in the config's ignore list, as readers ask. In a run directory every file has the SHA-256 that it was written
    with. An adapter beside the model corrects packed layers alone, with a scaling of 1.

    Args:
        model: Folder of a quantized model or of its run, or ORG/NAME[@REVISION] of a model on the Hub, which is read by
            ranges.
        against: Source of the model, as `model.source` names it, to measure each layer's error too; None for no error.
        trust_remote_code: Whether code that the model ships may run.

    Returns:
        What was checked.

    Raises:
        ConfigError: The model is of a run that is not finished.
        CheckpointError: Something is wrong with the model; the message names the first such thing.
    """
    opened = find_model(str(model))
    root = opened.folder.resolve().parent
    layout = RunLayout(root)
    is_of_run = not opened.is_remote and layout.identity.is_file() and opened.folder.resolve() == layout.model
    if is_of_run:
        _require_as_written(root)
    checkpoint = Checkpoint.open(opened.store)
    num_bytes = sum(entry.size_bytes for entry in checkpoint.entries.values())
    _log.info("%s: %s are read, %.1f GB", opened.store, counted(len(checkpoint.entries), "tensor"), num_bytes / 1e9)
    skeleton = Skeleton(opened.folder, torch.float32, trust_remote_code)
    source = Checkpoint.open_source(resolve_source(ModelConfig(source=str(against))).store) if against else None
    path = opened.folder / "config.json"
    packing, config = read_packing(path)
    stems = {stem for key in checkpoint.entries if (stem := stem_of(key, packing.MARK)) is not None}
    not_finite = check_weights(checkpoint, _unused(checkpoint, skeleton, stems))
    layers, unpacked = packed_layers(checkpoint, skeleton, stems)
    try:
        schemes = packing.read_schemes(config, [name for layer in layers for name in layer.config_names])
        inputs = packing.read_inputs(config)
        copied = copied_matrices(
            skeleton, checkpoint.entries, (k for k in checkpoint.entries if not is_packed(k, stems))
        )
        missing = [name for name in dict.fromkeys((*unpacked, *copied)) if not packing.is_ignored(config, name)]
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its quantization_config is incomplete: {error!r}") from error
    if missing:
        raise CheckpointError(
            f"{checkpoint.store}: {missing[0]} is neither packed nor in the config's ignore list; loaders would "
            "look for its packed tensors"
        )
    adapter = checked_adapter(opened, {layer.name: layer for layer in layers})
    original = _OriginalModel(source, skeleton, read_smoothing(opened.folder)) if source else None
    if original:
        original.require_scaled(checkpoint, [layer.name for layer in layers])
    if inputs is not None and inputs.is_static:
        read_input_scales(checkpoint, layers, inputs.bits)
    errors = {}
    wait = LongWait(f"{opened.store}: unpacked", len(layers), "layers")
    for number, layer in enumerate(layers, 1):
        W_hat = _check_linear(checkpoint, packing, layer, schemes[layer.config_names[0]])
        if original:
            corrections = adapter.corrections([layer.name]).values() if adapter is not None else ()
            errors[layer.stem] = original.error_of(layer.stem, sum((each.weight() for each in corrections), W_hat))
        wait.reached(number)
    return Verification(
        model=str(opened.store),
        num_linears=len(layers),
        num_tensors=len(checkpoint.entries),
        num_corrections=len(adapter.ranks) if adapter is not None else 0,
        inputs=inputs,
        cache_scales=len(checked_cache_scales(checkpoint, skeleton)) if config.get("kv_cache_scheme") else 0,
        not_finite=tuple(not_finite),
        checksums_compared=is_of_run,
        relative_weight_errors=errors,
    )


def _unused(checkpoint: Checkpoint, skeleton: Skeleton, stems: set[str]) -> set[str]:
    """Return the names of the tensors that belong neither to the model's class nor to a packed layer."""
    loose = (key for key in checkpoint.entries if not is_of_packed(key, stems))
    return {key for key in loose if skeleton.shape_of(skeleton.target_of(key)[0]) is None}


class _OriginalModel:
    """The source of a model, whose layers are read one after the other.

    Experts may be stacked in one tensor of the source, so the tensor that was read last stays in memory.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton, inputs: Sequence[SmoothedInput]) -> None:
        """Find the linear layers of the source by the names under which they are packed.

        Args:
            checkpoint: Checkpoint of the source.
            skeleton: The model on the meta device.
            inputs: How the result's inputs are smoothed.

        Raises:
            CheckpointError: The checkpoint is not the source of this model.
        """
        self._checkpoint = checkpoint
        self._by_key: dict[str, list[SmoothedInput]] = {}
        self._by_layer: dict[str | None, list[SmoothedInput]] = {}
        for smoothed in inputs:
            for key in dict.fromkeys(change.key for change in smoothed.changes):
                self._by_key.setdefault(key, []).append(smoothed)
            for name in dict.fromkeys(change.layer for change in smoothed.changes):
                self._by_layer.setdefault(name, []).append(smoothed)
        try:
            self._layers = {layer.stem: layer for layer in linear_layers(checkpoint, skeleton)}
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.store}: {error}; it is not the source of this model") from error
        self._last_tensor: dict[str, torch.Tensor] = {}

    def require_scaled(self, result: Checkpoint, quantized: Collection[str]) -> None:
        """Compare the norms and other tensors of the result that took factors of its inputs with those of the source.

        Args:
            result: Checkpoint of the result.
            quantized: Names of the packed layers.

        Raises:
            CheckpointError: A tensor is not that of the source with its factors.
        """
        names = set(quantized)
        for key in sorted(self._by_key.keys() & result.entries.keys()):
            tensors = self._checkpoint.read([key])
            expected = smoothed_tensors(tensors, self._by_key[key], self._layers.values(), names)[key]
            if not torch.equal(result.read([key])[key], expected):
                raise CheckpointError(
                    f"{result.place(key)}: tensor {key} is not that of {self._checkpoint.store} with the factors that "
                    "smoothing.json tells; the files are of different models"
                )

    def error_of(self, stem: str, W_hat: torch.Tensor) -> float:
        """Return ‖Ŵ − W‖_F / ‖W‖_F of a layer whose quantized weights [R, C] are given."""
        store, layer = self._checkpoint.store, self._layers.get(stem)
        if layer is None:
            raise CheckpointError(f"{store}: has no tensor for {stem}; it is not the source of this model")
        if layer.key not in self._last_tensor:
            self._last_tensor.clear()  # before the next one is read, so that only one is in memory
            self._last_tensor |= self._checkpoint.read([layer.key])
        W = smoothed_layer(
            layer.name, layer.stored(self._last_tensor[layer.key]).float(), self._by_layer.get(layer.name, ())
        )
        if W.shape != W_hat.shape:
            raise CheckpointError(f"{store}: {layer.key} is {list(W.shape)}, the quantized layer {list(W_hat.shape)}")
        return float(torch.linalg.vector_norm(W_hat - W) / torch.linalg.vector_norm(W).clamp(min=1e-30))


def _require_as_written(root: Path) -> None:
    """Compare every file of a run's model with what the run wrote.

    Raises:
        CheckpointError: A file is not as it was written.
    """
    run = RunDirectory(root, read_identity(root).key)
    folder = run.model
    files = read_inventory(run)
    wait = LongWait(f"{folder}: compared", sum(file.size_bytes for file in files) / 1e9, "GB with the run's SHA-256")
    wrong = []
    for file in files:
        if not _is_there(folder, file):
            wrong.append(file.name)
        wait.advanced(file.size_bytes / 1e9)
    if wrong:
        raise CheckpointError(
            f"{folder / wrong[0]}: is gone, or is not as the run wrote it (size and SHA-256 in {run.inventory.name}); "
            f"in all {len(wrong)} of {len(files)} files. `astro-dist quantize` with the run's configuration, of the "
            "same version, makes them anew"
        )


def _is_there(folder: Path, file: FileRecord) -> bool:
    path = folder / file.name
    return path.is_file() and path.stat().st_size == file.size_bytes and describe(folder, file.name) == file


def _check_linear(checkpoint: Checkpoint, packing: Layout, layer: LinearLayer, scheme: LayerScheme) -> torch.Tensor:
    """Unpack a layer, check its shape and its scales, and return its weights [R, C]."""
    names = packed_keys(packing, layer, scheme).values()
    linear = unpack_layer(packing, layer, checkpoint.read(name for name in names if name in checkpoint.entries), scheme)
    shape = (layer.rows, layer.columns)
    if tuple(linear.Q.shape) != shape:
        raise CheckpointError(
            f"{checkpoint.store}: {layer.stem} is packed as {list(linear.Q.shape)}, the model has {shape}"
        )
    if not bool((linear.grid.scale != 0).all()):
        raise CheckpointError(f"{checkpoint.store}: {layer.stem} has scales that are zero")
    return linear.dequantize()
