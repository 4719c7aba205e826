"""The model of a training: made from a config or from weights, and written as a plain checkpoint."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from astro.activation_regularization import ActivationRegularizer, regularized_layers
from astro.errors import AstroError, CheckpointError, ConfigError, StorageError, UnsupportedError
from astro.model.clips_file import CLIPS_FILE
from astro.storage.atomic import read_json, write_json
from astro_dist.config.training import TrainModelConfig
from astro_dist.source.demo import resolve_demo
from astro_dist.source.tokenizer import load_tokenizer

__all__ = ["build_model", "model_config", "model_tokenizer", "require_layers", "write_model"]


def model_config(config: TrainModelConfig) -> Any:
    """Return the transformers config of the model that is trained.

    Args:
        config: Section of the configuration.

    Raises:
        CheckpointError: The source has no config.json that transformers can read.
        ConfigError: A key of `overrides` is not known to the model.
        UnsupportedError: The source is quantized.
    """
    try:
        found = transformers.AutoConfig.from_pretrained(_source_path(config), **_options(config))
    except AstroError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"model.source {config.source}: its config.json cannot be read: {error}") from error
    if getattr(found, "quantization_config", None):
        raise UnsupportedError(f"model.source {config.source}: is quantized; give the model in 16 or 32 bits")
    for key, value in config.overrides.items():
        if not hasattr(found, key):
            raise ConfigError(f"model.overrides.{key}: {type(found).__name__} has no such key")
        setattr(found, key, value)
    return found


def model_tokenizer(config: TrainModelConfig) -> Any:
    """Return the tokenizer of the source.

    Args:
        config: Section of the configuration.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    return load_tokenizer(_source_path(config), f"model.source {config.source}", **_options(config))


def build_model(config: TrainModelConfig, seed: int) -> Any:
    """Return the model with its first weights, in float32 on the CPU.

    Args:
        config: Section of the configuration.
        seed: Seed of random weights.

    Raises:
        InputError: The source cannot be read, or transformers has no causal language model for it.
    """
    settings = model_config(config)
    torch.manual_seed(seed)
    auto: Any = transformers.AutoModelForCausalLM
    info: dict[str, Any] = {}
    if config.start == "weights":
        try:
            model, info = auto.from_pretrained(
                _source_path(config), dtype=torch.float32, output_loading_info=True, **_options(config)
            )
        except Exception as error:  # whatever the model's own code raises
            raise _no_model(config, error) from error
    else:
        model = _from_config(config, settings)
    missing = [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())]
    if missing:
        raise CheckpointError(f"model.source {config.source}: holds no fitting weights for {missing[0]}")
    model.config.use_cache = False
    return model.train()


def require_layers(config: TrainModelConfig, settings: Any, patterns: Sequence[str]) -> None:
    """Refuse patterns that match no layer of the model, which is made without memory for that.

    Args:
        config: Section of the configuration.
        settings: Its transformers config, as `model_config` returns it.
        patterns: Shell patterns for names of linear layers.

    Raises:
        InputError: A pattern matches none, or transformers has no causal language model for the source.
    """
    with torch.device("meta"):
        model = _from_config(config, settings)
    regularized_layers(model, patterns)


def _from_config(config: TrainModelConfig, settings: Any) -> Any:
    """Return the model with random weights, in float32 on the current device."""
    try:
        return transformers.AutoModelForCausalLM.from_config(
            settings, dtype=torch.float32, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # whatever the model's own code raises
        raise _no_model(config, error) from error


def _no_model(config: TrainModelConfig, error: Exception) -> UnsupportedError:
    return UnsupportedError(
        f"model.source {config.source}: no causal language model can be made of it: {type(error).__name__}: "
        f"{str(error).splitlines()[0] if str(error) else 'no reason given'}"
    )


def write_model(
    model: Any,
    state: Mapping[str, torch.Tensor],
    tokenizer: Any,
    regularizer: ActivationRegularizer,
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """Write a checkpoint that transformers loads, and the learned clips beside it. The folder appears when it is whole.

    Args:
        model: The model, of the class that is written.
        state: All its weights by name, on the CPU.
        tokenizer: Tokenizer of the source.
        regularizer: Clips of the layers.
        folder: Where the checkpoint belongs.
        dtype: Dtype in which weights are written.

    Raises:
        StorageError: The folder cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    weights = {name: tensor.to(dtype) for name, tensor in state.items() if name not in tied}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.config.use_cache = True
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        config = read_json(partial / "config.json")
        # FSDP2 gives the class of a model another name, and transformers writes the dtype of its parameters.
        names = [type(model).__name__.removeprefix("FSDP")]
        write_json(partial / "config.json", {**config, "architectures": names, "dtype": str(dtype).split(".")[1]})
        if regularizer.settings.input_bits is not None:
            regularizer.save(partial / CLIPS_FILE)
        mode = (partial / "config.json").stat().st_mode
        for path in partial.glob("*.safetensors"):
            path.chmod(mode)  # the library lets the owner alone read
        shutil.rmtree(folder, ignore_errors=True)  # of a worker that was lost behind this line
        os.replace(partial, folder)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error}") from error
    finally:
        model.config.use_cache = False


def _source_path(config: TrainModelConfig) -> str:
    """Return what transformers loads: a folder, or ORG/NAME on the Hub."""
    return str(resolve_demo(config.source)) if config.source.startswith("demo:") else config.source


def _options(config: TrainModelConfig) -> dict[str, Any]:
    return {"revision": config.revision or "main", "trust_remote_code": config.trust_remote_code}
