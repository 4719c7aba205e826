"""The compressed-tensors `pack-quantized` layout, which vLLM, SGLang and transformers read.

For a linear layer `name` of R rows and C columns in G groups:

    name.weight_packed      int32 [R, ceil(C·b/32)]   value + 2^(b−1), least significant bits first
    name.weight_scale       [R, G]                    in the model's dtype
    name.weight_shape       int64 [2]                 R, C
    name.weight_zero_point  int32 [ceil(R·b/32), G]   packed along rows; only where asymmetric

No `weight_g_idx`: with a static activation order the columns are stored in their original order.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from astro.config import PER_CHANNEL, Quantization
from astro.errors import CheckpointError
from astro.formats.bit_packing import pack, unpack
from astro.formats.server_limits import group_size_notes, low_width_notes, mixed_fusion_notes
from astro.quantization.grid import Grid, QuantizedLinear

__all__ = [
    "MARK", "METHOD", "SCALE_DTYPE", "is_ignored", "pack_linear", "quantization_config", "read_settings",
    "refusal", "server_notes", "suffixes", "unpack_linear",
]  # fmt: skip

METHOD = "compressed-tensors"
"""`quant_method` in config.json."""
MARK = "weight_packed"
"""Ending of the tensor that tells a packed layer."""
SCALE_DTYPE = None
"""Scales are stored in the model's dtype."""


def suffixes(settings: Quantization) -> tuple[str, ...]:
    """What a linear layer's `weight` becomes."""
    names = ("weight_packed", "weight_scale", "weight_shape")
    return names if settings.symmetric else (*names, "weight_zero_point")


def refusal(rows: int, columns: int, settings: Quantization) -> str | None:
    """Why a layer cannot be stored so: never, rows are padded to whole words."""
    return None


def pack_linear(name: str, linear: QuantizedLinear, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors that store one linear layer.

    Args:
        name: the layer's name in the checkpoint, without `.weight`.
        linear: integers and grid.
        scale_dtype: dtype of `weight_scale`; the grid's scales are exact in it.

    Returns:
        Tensors by checkpoint name, on the layer's device.
    """
    grid = linear.grid
    tensors = {
        f"{name}.weight_packed": pack(linear.Q, grid.bits),
        f"{name}.weight_scale": grid.scale.to(scale_dtype),
        f"{name}.weight_shape": torch.tensor(linear.Q.shape, dtype=torch.int64),
    }
    if not grid.symmetric:
        tensors[f"{name}.weight_zero_point"] = pack(grid.zero.to(torch.int8).T, grid.bits).T.contiguous()
    return tensors


def unpack_linear(name: str, tensors: Mapping[str, torch.Tensor], settings: Quantization) -> QuantizedLinear:
    """Read back one linear layer.

    Args:
        name: the layer's name in the checkpoint.
        tensors: at least the layer's own tensors, by checkpoint name.
        settings: bits, group size and symmetry it was written with.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the others ask for.
    """
    missing = [f"{name}.{suffix}" for suffix in suffixes(settings) if f"{name}.{suffix}" not in tensors]
    if missing:
        raise CheckpointError(f"packed layer {name}: missing {', '.join(missing)}")
    shape = tensors[f"{name}.weight_shape"].tolist()
    if len(shape) != 2 or min(shape) < 1:
        raise CheckpointError(f"packed layer {name}: weight_shape should hold two positive sizes, got {shape}")
    rows, columns = shape
    group_size = settings.columns_per_group(columns)
    scale = tensors[f"{name}.weight_scale"].float()
    if tuple(scale.shape) != (rows, columns // group_size):
        raise CheckpointError(
            f"packed layer {name}: weight_scale should be {[rows, columns // group_size]}, got {list(scale.shape)}"
        )
    if tensors[f"{name}.weight_packed"].ndim != 2:
        raise CheckpointError(f"packed layer {name}: weight_packed should have two dimensions")
    Q = unpack(tensors[f"{name}.weight_packed"], settings.width, columns)
    if len(Q) != rows:
        raise CheckpointError(f"packed layer {name}: weight_packed should have {rows} rows, got {len(Q)}")
    zero = torch.zeros_like(scale)
    if not settings.symmetric:
        packed = tensors[f"{name}.weight_zero_point"]
        if packed.ndim != 2 or packed.shape[1] != scale.shape[1]:
            raise CheckpointError(f"packed layer {name}: weight_zero_point should have {scale.shape[1]} columns")
        zero = unpack(packed.T, settings.width, rows).T.float()
    return QuantizedLinear(Q, Grid(scale, zero, settings.width, group_size, settings.symmetric))


def quantization_config(settings: Mapping[str, Quantization], ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        settings: bits, group size, symmetry and activation order of each quantized layer by module name.
        ignore: names of the linear modules that are not quantized.
    """
    schemes: list[tuple[dict[str, Any], list[str]]] = []
    for name, own in settings.items():
        weights = _weights_scheme(own)
        members = next((members for scheme, members in schemes if scheme == weights), None)
        if members is None:
            schemes.append((weights, [name]))
        else:
            members.append(name)
    groups = {
        f"group_{i}": {"targets": ["Linear"] if len(schemes) == 1 else members, "weights": weights}
        for i, (weights, members) in enumerate(schemes)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
    }


def read_settings(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Quantization]:
    """The settings of each layer by name, from a `quantization_config` as `quantization_config` writes it.

    Args:
        config: read from config.json.
        names: module names of the packed layers.

    Raises:
        CheckpointError: the method or format is another, or no group of the config, or more than one, names a layer.
    """
    if (config["quant_method"], config["format"]) != ("compressed-tensors", "pack-quantized"):
        raise CheckpointError(
            f"expected compressed-tensors pack-quantized, got {config['quant_method']} {config['format']}"
        )
    found: dict[str, Quantization] = {}
    for group in config["config_groups"].values():
        weights = group["weights"]
        size = PER_CHANNEL if weights["strategy"] == "channel" else weights["group_size"]
        settings = Quantization(bits=weights["num_bits"], group_size=size, symmetric=weights["symmetric"])
        for name in names if group["targets"] == ["Linear"] else group["targets"]:
            if name in found:
                raise CheckpointError(f"two config_groups name layer {name}")
            found[name] = settings
    lacking = [name for name in names if name not in found]
    if lacking:
        raise CheckpointError(f"no config_group names the packed layer {lacking[0]}")
    return found


def is_ignored(config: Mapping[str, Any], name: str) -> bool:
    """Whether a `quantization_config` says that a linear module is not packed."""
    return name in config["ignore"]


def server_notes(settings: Mapping[str, Quantization], ignore: Sequence[str]) -> list[str]:
    """What servers are known to refuse about these settings, one sentence each; empty where all load it.

    Args:
        settings: of each quantized layer by module name; a width that is not settled yet is not judged.
        ignore: names of the linear modules that are not quantized.
    """
    below = (
        "no server has a kernel for this layout (vLLM and SGLang refuse it); transformers with compressed-tensors "
        "loads it"
    )
    notes = [*low_width_notes(settings, below), *group_size_notes(settings)]
    if any(not own.symmetric and own.bits in (4, 8) for own in settings.values()):
        notes.append(
            "asymmetric weights: vLLM's CUDA Marlin kernels are symmetric, a slower kernel may serve them; "
            "transformers with compressed-tensors 0.20 refuses packed zero points"
        )
    return [*notes, *mixed_fusion_notes(settings, ignore)]


def _weights_scheme(settings: Quantization) -> dict[str, Any]:
    per_channel = settings.group_size == PER_CHANNEL
    return {
        "num_bits": settings.width,
        "type": "int",
        "symmetric": settings.symmetric,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else settings.group_size,
        "actorder": "static" if settings.act_order == "static" and not per_channel else None,
        "dynamic": False,
    }
