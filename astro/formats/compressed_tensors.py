"""The compressed-tensors `pack-quantized` layout, which vLLM, SGLang and transformers read.

For a linear layer `name` of R rows and C columns in G groups:

    name.weight_packed      int32 [R, ceil(C·b/32)]   value + 2^(b−1), least significant bits first
    name.weight_scale       [R, G]                    in the model's dtype
    name.weight_shape       int64 [2]                 R, C
    name.weight_zero_point  int32 [ceil(R·b/32), G]   packed along rows; only where asymmetric
    name.input_scale, name.input_zero_point  float32 [1], see `InputClips`; only with learned clips, in another file

No `weight_g_idx`: with a static activation order the columns are stored in their original order.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from astro.activation_config import ActivationScheme
from astro.config import PER_CHANNEL, LayerScheme
from astro.errors import CheckpointError, ConfigError
from astro.formats.fused_layers import mixed_layers
from astro.formats.rounded_inputs import inputs_notes, inputs_refusal
from astro.formats.server_limits import (
    conversion_notes,
    group_size_notes,
    low_width_notes,
    settled,
)
from astro.model.experts import experts_of
from astro.model.linear_layer import LinearLayer
from astro.quantization.grid import Grid, QuantizedLinear
from astro.storage.bit_packing import pack, unpack

__all__ = [
    "FP8_CACHE", "MARK", "METHOD", "READER_PACKAGES", "SCALE_DTYPE", "fusion_refusal", "inputs_notes", "inputs_refusal",
    "is_ignored", "pack_linear", "quantization_config", "read_inputs", "read_schemes", "reader_notes", "refusal",
    "server_notes", "suffixes", "unpack_linear",
]  # fmt: skip

METHOD = "compressed-tensors"
"""What config.json calls the layout in `quant_method`."""
MARK = "weight_packed"
"""Ending of the tensor name by which a reader sees that a layer is packed."""
SCALE_DTYPE: torch.dtype | None = None
"""Scales are stored in the dtype that the model's weights have."""
READER_PACKAGES = "compressed-tensors"
"""What transformers needs besides itself to read the layout."""
FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
"""What `kv_cache_scheme` of the config says where keys and values are held in FP8, with scales in the checkpoint."""
_FORMAT = "pack-quantized"
"""What config.json calls the way in which weights are packed."""
_ORDERED = (None, "static", "weight")
"""Values of `actorder` under which columns that share a scale lie side by side."""


def suffixes(scheme: LayerScheme) -> tuple[str, ...]:
    """Return the endings of the tensors that replace a linear layer's `weight`; see `Layout`."""
    names = ("weight_packed", "weight_scale", "weight_shape")
    return names if scheme.symmetric else (*names, "weight_zero_point")


def refusal(rows: int, columns: int, scheme: LayerScheme) -> str | None:
    """Say why a layer cannot be stored: every layer can, since rows are padded to whole words; see `Layout`."""
    return None


def pack_linear(name: str, linear: QuantizedLinear, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors that store one linear layer.

    Args:
        name: Name of the layer in the checkpoint, without `.weight`.
        linear: Integers and grid of the layer.
        scale_dtype: Dtype of `weight_scale`; the grid's scales are exact in it.

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


def unpack_linear(name: str, tensors: Mapping[str, torch.Tensor], scheme: LayerScheme) -> QuantizedLinear:
    """Read one linear layer back.

    Args:
        name: Name of the layer in the checkpoint, without `.weight`.
        tensors: Tensors by checkpoint name; those of the layer must be among them.
        scheme: Bits, group size and symmetry that the layer was written with.

    Raises:
        CheckpointError: A tensor is missing or has another shape than the others ask for.
    """
    missing = [f"{name}.{suffix}" for suffix in suffixes(scheme) if f"{name}.{suffix}" not in tensors]
    if missing:
        raise CheckpointError(f"packed layer {name}: missing {', '.join(missing)}")
    shape = tensors[f"{name}.weight_shape"].tolist()
    if len(shape) != 2 or min(shape) < 1:
        raise CheckpointError(f"packed layer {name}: weight_shape should hold two positive sizes, got {shape}")
    rows, columns = shape
    group_size = scheme.columns_per_group(columns)
    scale = tensors[f"{name}.weight_scale"].float()
    if tuple(scale.shape) != (rows, columns // group_size):
        raise CheckpointError(
            f"packed layer {name}: weight_scale should be {[rows, columns // group_size]}, got {list(scale.shape)}"
        )
    if tensors[f"{name}.weight_packed"].ndim != 2:
        raise CheckpointError(f"packed layer {name}: weight_packed should have two dimensions")
    Q = unpack(tensors[f"{name}.weight_packed"], scheme.bits, columns)
    if len(Q) != rows:
        raise CheckpointError(f"packed layer {name}: weight_packed should have {rows} rows, got {len(Q)}")
    zero = torch.zeros_like(scale)
    if not scheme.symmetric:
        packed = tensors[f"{name}.weight_zero_point"]
        if packed.ndim != 2 or packed.shape[1] != scale.shape[1]:
            raise CheckpointError(f"packed layer {name}: weight_zero_point should have {scale.shape[1]} columns")
        zero = unpack(packed.T, scheme.bits, rows).T.float()
    return QuantizedLinear(Q, Grid(scale, zero, scheme.bits, group_size, scheme.symmetric))


def quantization_config(
    schemes: Mapping[str, LayerScheme],
    ignore: Sequence[str],
    act_order: Literal["static", "none"],
    inputs: ActivationScheme | None = None,
) -> dict[str, Any]:
    """Return the `quantization_config` that config.json holds.

    Args:
        schemes: Bits, group size and symmetry of every quantized layer, by module name.
        ignore: Names of the linear modules that are not quantized.
        act_order: Order in which the solver visited columns.
        inputs: Kind of grid to which servers round the inputs of every quantized layer; None where they stay as they
            are.
    """
    # Without a format of the group, compressed-tensors would take such weights for unpacked ones.
    rounded = {} if inputs is None else {"input_activations": _inputs(inputs), "format": _FORMAT}
    members: dict[LayerScheme, list[str]] = {}
    for name, scheme in schemes.items():
        members.setdefault(scheme, []).append(name)
    config_groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(members) == 1 else names,
            "weights": _weights(scheme, act_order),
            **rounded,
        }
        for i, (scheme, names) in enumerate(members.items())
    }
    return {
        "quant_method": METHOD,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": list(ignore),
    }


def read_inputs(config: Mapping[str, Any]) -> ActivationScheme | None:
    """Read to which kind of grid servers round the inputs of quantized layers; None where they stay as they are.

    Args:
        config: The `quantization_config` of config.json.

    Raises:
        CheckpointError: Inputs are rounded in a way that `quantization_config` never writes, or not alike in all
            layers.
    """
    every = {_read_inputs(config_group.get("input_activations")) for config_group in config["config_groups"].values()}
    if len(every) > 1:
        raise CheckpointError("its config_groups round the inputs of layers differently, which is not read here")
    return next(iter(every), None)


def read_schemes(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, LayerScheme]:
    """Read the schemes of layers from a `quantization_config` that `quantization_config` wrote.

    Args:
        config: The `quantization_config` of config.json.
        names: Module names of the packed layers.

    Raises:
        CheckpointError: The method or format is another, as is the order of columns, or not exactly one entry of
            `config_groups` names a layer.
    """
    if (config["quant_method"], config["format"]) != (METHOD, _FORMAT):
        raise CheckpointError(f"expected {METHOD} {_FORMAT}, got {config['quant_method']} {config['format']}")
    if config.get("transform_config"):
        raise CheckpointError("its layers are in a rotated basis (transform_config), which is not read here")
    by_name: dict[str, LayerScheme] = {}
    for config_group in config["config_groups"].values():
        weights = config_group["weights"]
        if weights.get("actorder") not in _ORDERED:
            raise CheckpointError(
                f"expected columns in order, got actorder {weights['actorder']!r}: the group of each column is in "
                "weight_g_idx, which is not read here"
            )
        size = PER_CHANNEL if weights["strategy"] == "channel" else weights["group_size"]
        scheme = LayerScheme(bits=weights["num_bits"], group_size=size, symmetric=weights["symmetric"])
        for name in names if config_group["targets"] == ["Linear"] else config_group["targets"]:
            if name in by_name:
                raise CheckpointError(f"two config_groups name layer {name}")
            by_name[name] = scheme
    lacking = [name for name in names if name not in by_name]
    if lacking:
        raise CheckpointError(f"no config_group names the packed layer {lacking[0]}")
    return by_name


def is_ignored(config: Mapping[str, Any], name: str) -> bool:
    """Tell whether a `quantization_config` says that a linear module is not packed; see `Layout`."""
    return name in config["ignore"]


def fusion_refusal(schemes: Mapping[str, Sequence[LayerScheme]], ignore: Sequence[str]) -> str | None:
    """Return None: readers other than vLLM load layers of different schemes, so that a note is enough; see `Layout`."""
    return None


def server_notes(schemes: Mapping[str, Sequence[LayerScheme]], ignore: Sequence[str]) -> list[str]:
    """Say what servers are known to refuse about some layers, one sentence each; see `Layout`."""
    below = (
        "of the servers, vLLM from 0.32 on has a kernel for this layout by its source (Humming, on CUDA GPUs), which "
        "is not tested here; transformers with compressed-tensors loads it"
    )
    notes = [*low_width_notes(schemes, below), *group_size_notes(schemes)]
    if any(not scheme.symmetric and scheme.bits in (4, 8) for scheme in settled(schemes)):
        notes.append(
            "asymmetric weights: vLLM's CUDA Marlin kernels are symmetric, a slower kernel may serve them; "
            "transformers with compressed-tensors 0.20 refuses packed zero points"
        )
    if any(experts_of(name) and not all(s.symmetric for s in possible) for name, possible in schemes.items()):
        notes.append("asymmetric weights of experts: vLLM's kernels for experts are symmetric, and it refuses them")
    return [*notes, *mixed_layers(schemes, ignore)]


def reader_notes(layers: Iterable[LinearLayer]) -> list[str]:
    """Say what transformers cannot read of some layers, or reads wrongly; see `Layout`."""
    return conversion_notes(layers)


def _weights(scheme: LayerScheme, act_order: str) -> dict[str, Any]:
    per_channel = scheme.group_size == PER_CHANNEL
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else scheme.group_size,
        "actorder": "static" if act_order == "static" and not per_channel else None,
        "dynamic": False,
    }


def _inputs(scheme: ActivationScheme) -> dict[str, Any]:
    """Say how inputs are rounded in the words of compressed-tensors: by a scale a token, or by tensors of the layer.

    Those tensors are `input_scale` and `input_zero_point`; the latter is no integer, see `InputClips`.
    """
    if scheme.is_static:
        kind = {"strategy": "tensor", "dynamic": False, "symmetric": False, "zp_dtype": "torch.float32"}
    else:
        kind = {"strategy": "token", "dynamic": True, "symmetric": True}
    return {"num_bits": scheme.bits, "type": scheme.type, **kind}


def _read_inputs(args: Mapping[str, Any] | None) -> ActivationScheme | None:
    if args is None:
        return None
    try:
        scheme = ActivationScheme(args["num_bits"], args["type"], is_static=not args.get("dynamic"))
    except ConfigError as error:
        raise CheckpointError(f"input_activations: {error}") from error
    written = _inputs(scheme)
    if any(args.get(key) != value for key, value in written.items()):
        raise CheckpointError(f"input_activations: expected {written}, got {dict(args)}; others are not read here")
    return scheme
