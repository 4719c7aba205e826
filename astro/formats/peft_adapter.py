"""Corrections of low rank in the files of a LoRA adapter, as PEFT writes them and vLLM reads them.

A folder of two files: adapter_model.safetensors holds `base_model.model.LAYER.lora_A.weight` [r, C] of each layer and
`lora_B.weight` [R, r] beside it; adapter_config.json names the layers and their ranks. PEFT adds (alpha / r) B (A x),
and alpha is written equal to r everywhere, so that the scaling is 1.
"""

from collections.abc import Mapping
from typing import Any

import torch

from astro.errors import CheckpointError
from astro.model.low_rank import LowRank

__all__ = ["CONFIG_NAME", "FOLDER", "WEIGHTS_NAME", "adapter_config", "layer_of", "pack", "pack_names", "unpack"]

FOLDER = "adapter"
"""Folder of the adapter in that of the model."""
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def layer_of(key: str) -> str:
    """Return the name of the layer that a tensor of an adapter belongs to.

    Args:
        key: Name of the tensor.

    Raises:
        CheckpointError: The tensor is none of an adapter's.
    """
    if not (key.startswith(_PREFIX) and key.endswith((_A, _B))):
        raise CheckpointError(f"{key} is no tensor of a LoRA adapter of linear layers")
    return key.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)


def pack_names(name: str) -> tuple[str, str]:
    """Return the names of the tensors that store the factors A and B of a layer's correction.

    Args:
        name: Name of the layer's module.
    """
    return f"{_PREFIX}{name}{_A}", f"{_PREFIX}{name}{_B}"


def pack(corrections: Mapping[str, LowRank]) -> dict[str, torch.Tensor]:
    """Return the tensors that store corrections.

    Args:
        corrections: The correction of each layer by the name of its module.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, correction in corrections.items():
        tensors |= dict(zip(pack_names(name), (correction.A, correction.B), strict=True))
    return tensors


def unpack(tensors: Mapping[str, torch.Tensor]) -> dict[str, LowRank]:
    """Read corrections back, by the name of the layer's module.

    Args:
        tensors: Tensors that `pack` returned, of any number of layers.

    Raises:
        CheckpointError: A tensor is missing, is no tensor of an adapter, or does not fit the other of its layer.
    """
    corrections: dict[str, LowRank] = {}
    for name in dict.fromkeys(map(layer_of, tensors)):
        A, B = map(tensors.get, pack_names(name))
        if A is None or B is None:
            raise CheckpointError(f"{name}: only one of its two factors is in the adapter")
        if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1] or A.dtype != B.dtype:
            raise CheckpointError(
                f"{name}: expected factors [r, inputs] and [outputs, r] of one dtype, got {list(A.shape)} {A.dtype} "
                f"and {list(B.shape)} {B.dtype}"
            )
        corrections[name] = LowRank(A, B)
    return corrections


def adapter_config(ranks: Mapping[str, int], base_model: str | None) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    The largest rank is that of the adapter; `rank_pattern` and `alpha_pattern` name the layers with another one.

    Args:
        ranks: Rank of the correction of each layer by the name of its module.
        base_model: Name of the model that the adapter belongs to; None where it has none yet.
    """
    largest = max(ranks.values())
    others = {name: rank for name, rank in sorted(ranks.items()) if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
    }
