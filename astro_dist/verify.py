"""Re-read a written model and compare it with what its own config promises and its loaders ask for."""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from astro.checkpoint import Checkpoint, require_finite
from astro.config import Quantization
from astro.errors import CheckpointError, InputError
from astro.files import read_json
from astro.formats import LAYOUTS
from astro.skeleton import Skeleton
from astro_dist.config import ModelConfig
from astro_dist.source import resolve_source

__all__ = ["verify_model"]


def verify_model(folder: Path, against: Path | str | None = None) -> dict[str, Any]:
    """Check a quantized model.

    Every parameter of the model's transformers class has its tensor, or is a linear layer with all of its packed
    tensors in the right shapes; every float is finite and no scale zero; no layer is there twice.

    Args:
        folder: of the quantized model.
        against: its source, as `model.source` names it; then each layer's ‖Ŵ − W‖_F / ‖W‖_F is measured too.

    Returns:
        Counts, and the errors by layer.

    Raises:
        CheckpointError: naming the first thing that is wrong.
    """
    checkpoint = Checkpoint.open(folder)
    require_finite(checkpoint)
    skeleton = Skeleton(folder, torch.float32)
    source = Checkpoint.open(resolve_source(ModelConfig(source=str(against))).store) if against else None
    path = folder / "config.json"
    config = read_json(path).get("quantization_config")
    packed = LAYOUTS.get(str(config.get("quant_method"))) if isinstance(config, dict) else None
    if packed is None:
        raise CheckpointError(f"{path}: its quantization_config is missing, or of no layout known here: {config!r:.80}")
    mark = f".{packed.MARK}"
    stems = {
        key.removesuffix(mark): skeleton.target_of(key.removesuffix(mark) + ".weight")[0]
        for key in checkpoint.entries
        if key.endswith(mark)
    }
    names = {stem: target.removesuffix(".weight") for stem, target in stems.items()}
    try:
        settings = packed.read_settings(config, list(names.values()))
        ignored = {name for name, _ in skeleton.model.named_modules() if packed.is_ignored(config, name)}
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its quantization_config is incomplete: {error!r}") from error
    expected = {f"{stem}.{suffix}" for stem in stems for suffix in packed.suffixes(settings[names[stem]])}
    _check_parameters(checkpoint, skeleton, set(stems.values()), ignored, expected)
    errors = {stem: _check_linear(checkpoint, skeleton, packed, stem, settings[names[stem]], source) for stem in stems}
    return {
        "model": str(folder),
        "linears": len(stems),
        "tensors": len(checkpoint.entries),
        "relative_weight_errors": {stem: error for stem, error in errors.items() if error is not None},
    }


def _check_parameters(
    checkpoint: Checkpoint, skeleton: Skeleton, packed: set[str], ignored: set[str], expected: set[str]
) -> None:
    plain = {skeleton.target_of(key)[0]: key for key in checkpoint.entries if key not in expected}
    tied = set(getattr(skeleton.model, "all_tied_weights_keys", None) or ())
    for target in sorted(packed & set(plain)):
        raise CheckpointError(f"{checkpoint.store}: {plain[target]} is there beside its packed tensors")
    for name, module in skeleton.model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            target = f"{name}.{own}" if name else own
            if target in packed:
                continue
            if target not in plain and target not in tied:
                raise CheckpointError(f"{checkpoint.store}: no tensor for {target} of {type(skeleton.model).__name__}")
            if target in plain and checkpoint.entries[plain[target]].shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{checkpoint.store}: {plain[target]} should be {list(parameter.shape)}, "
                    f"got {list(checkpoint.entries[plain[target]].shape)}"
                )
            if isinstance(module, nn.Linear) and own == "weight" and name not in ignored:
                raise CheckpointError(
                    f"{checkpoint.store}: {name} is neither packed nor in the config's ignore list; loaders would "
                    "look for its packed tensors"
                )


def _check_linear(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    packed: ModuleType,
    stem: str,
    settings: Quantization,
    source: Checkpoint | None,
) -> float | None:
    wanted = [f"{stem}.{suffix}" for suffix in packed.suffixes(settings)]
    tensors = checkpoint.read(name for name in wanted if name in checkpoint.entries)
    linear = packed.unpack_linear(stem, tensors, settings)
    shape = skeleton.shape_of(skeleton.target_of(f"{stem}.weight")[0])
    if tuple(linear.Q.shape) != shape:
        raise CheckpointError(f"{checkpoint.store}: {stem} is packed as {list(linear.Q.shape)}, the model has {shape}")
    if not bool((linear.grid.scale != 0).all()):
        raise CheckpointError(f"{checkpoint.store}: {stem} has scales that are zero")
    return _weight_error(source, stem, linear.dequantize()) if source else None


def _weight_error(source: Checkpoint, stem: str, W_hat: torch.Tensor) -> float:
    key = f"{stem}.weight"
    if key not in source.entries:
        raise CheckpointError(f"{source.store}: has no tensor {key}; it is not the source of this model")
    W = source.read([key])[key].float()
    if W.shape != W_hat.shape:
        raise CheckpointError(f"{source.store}: {key} is {list(W.shape)}, the quantized layer {list(W_hat.shape)}")
    return float(torch.linalg.vector_norm(W_hat - W) / torch.linalg.vector_norm(W).clamp(min=1e-30))
