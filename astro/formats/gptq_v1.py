"""The GPTQ layout, version 1, which GPTQModel, vLLM, SGLang and transformers read.

For a linear layer `name` of R rows and C columns in G groups, words packed least significant bits first:

    name.qweight  int32 [C·b/32, R]   value + 2^(b−1), packed along columns
    name.qzeros   int32 [G, R·b/32]   zero point + 2^(b−1) − 1, packed along rows
    name.scales   float16 [G, R]
    name.g_idx    int32 [C]           group of each column

Readers add 1 to what `qzeros` holds. Symmetric only: an unsigned zero point of 0 has no place there, and vLLM refuses
asymmetric layers of this layout. With a static activation order columns lie in their original order, so `desc_act` is
false.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from astro.activation_config import ActivationScheme
from astro.config import LayerScheme
from astro.errors import CheckpointError, ConfigError
from astro.formats.fused_layers import fused_name, mixed_layers
from astro.formats.server_limits import conversion_notes, group_size_notes, low_width_notes
from astro.model.linear_layer import LinearLayer
from astro.quantization.grid import Grid, QuantizedLinear
from astro.storage.bit_packing import pack, unpack

__all__ = [
    "MARK", "METHOD", "READER_PACKAGES", "SCALE_DTYPE", "fusion_refusal", "inputs_notes", "inputs_refusal",
    "is_ignored", "pack_linear", "quantization_config", "read_inputs", "read_schemes", "reader_notes", "refusal",
    "server_notes", "suffixes", "unpack_linear",
]  # fmt: skip

METHOD = "gptq"
"""What config.json calls the layout in `quant_method`."""
MARK = "qweight"
"""Ending of the tensor name by which a reader sees that a layer is packed."""
SCALE_DTYPE: torch.dtype | None = torch.float16
"""Scales are stored in float16, whatever dtype the model's weights have."""
READER_PACKAGES = "gptqmodel optimum"
"""What transformers needs besides itself to read the layout."""


def suffixes(scheme: LayerScheme) -> tuple[str, ...]:
    """Return the endings of the tensors that replace a linear layer's `weight`; see `Layout`."""
    return ("qweight", "qzeros", "scales", "g_idx")


def refusal(rows: int, columns: int, scheme: LayerScheme) -> str | None:
    """Say why a layer cannot be stored; None where it can.

    Args:
        rows: Number of the layer's outputs.
        columns: Number of the layer's inputs.
        scheme: Bits, group size and symmetry of the layer.
    """
    if rows * scheme.bits % 32 or columns * scheme.bits % 32:
        return f"{rows} x {columns} weights of {scheme.bits} bits do not fill whole words of 32 bits"
    return None


def pack_linear(name: str, linear: QuantizedLinear, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors that store one linear layer.

    Args:
        name: Name of the layer in the checkpoint, without `.weight`.
        linear: Integers and symmetric grid of the layer.
        scale_dtype: Dtype of `scales`; the grid's scales are exact in it.

    Returns:
        Tensors by checkpoint name, on the layer's device.
    """
    grid, (rows, columns) = linear.grid, linear.Q.shape
    groups = grid.scale.shape[1]
    zeros = torch.full((groups, rows), -1, dtype=torch.int8, device=linear.Q.device)
    return {
        f"{name}.qweight": pack(linear.Q, grid.bits).T.contiguous(),
        f"{name}.qzeros": pack(zeros, grid.bits),
        f"{name}.scales": grid.scale.to(scale_dtype).T.contiguous(),
        f"{name}.g_idx": _group_of_each_column(columns, grid.group_size),
    }


def unpack_linear(name: str, tensors: Mapping[str, torch.Tensor], scheme: LayerScheme) -> QuantizedLinear:
    """Read one linear layer back.

    Args:
        name: Name of the layer in the checkpoint, without `.weight`.
        tensors: Tensors by checkpoint name; those of the layer must be among them.
        scheme: Bits and group size that the layer was written with.

    Raises:
        CheckpointError: A tensor is missing, has another shape than the others ask for, or a value of no meaning here.
    """
    missing = [f"{name}.{suffix}" for suffix in suffixes(scheme) if f"{name}.{suffix}" not in tensors]
    if missing:
        raise CheckpointError(f"packed layer {name}: missing {', '.join(missing)}")
    words, scales, g_idx = (tensors[f"{name}.{suffix}"] for suffix in ("qweight", "scales", "g_idx"))
    if words.ndim != 2 or scales.ndim != 2 or g_idx.ndim != 1 or not len(g_idx):
        raise CheckpointError(f"packed layer {name}: qweight and scales should have two dimensions, g_idx one")
    rows, columns = words.shape[1], len(g_idx)
    group_size = scheme.columns_per_group(columns)
    if tuple(scales.shape) != (columns // group_size, rows):
        raise CheckpointError(
            f"packed layer {name}: scales should be {[columns // group_size, rows]}, got {list(scales.shape)}"
        )
    if not torch.equal(g_idx.cpu(), _group_of_each_column(columns, group_size)):
        raise CheckpointError(f"packed layer {name}: g_idx should number groups of {group_size} columns in order")
    zeros = unpack(tensors[f"{name}.qzeros"], scheme.bits, rows)
    if len(zeros) != len(scales) or not bool((zeros == -1).all()):
        raise CheckpointError(f"packed layer {name}: qzeros should say symmetric for every group")
    scale = scales.float().T.contiguous()
    Q = unpack(words.T, scheme.bits, columns)
    return QuantizedLinear(Q, Grid(scale, torch.zeros_like(scale), scheme.bits, group_size, symmetric=True))


def quantization_config(
    schemes: Mapping[str, LayerScheme],
    ignore: Sequence[str],
    act_order: Literal["static", "none"],
    inputs: ActivationScheme | None = None,
) -> dict[str, Any]:
    """Return the `quantization_config` that config.json holds: the commonest scheme, and what differs from it.

    Args:
        schemes: Bits and group size of every quantized layer, by module name.
        ignore: Names of the linear modules that are not quantized.
        act_order: Order in which the solver visited columns; the layout has no field for a static one.
        inputs: None, because the layout has no field for inputs that are rounded.

    Raises:
        ConfigError: Inputs are to be rounded.
    """
    if refusal := inputs_refusal([], {}, inputs):
        raise ConfigError(refusal)
    commonest, _ = Counter(schemes.values()).most_common(1)[0]
    changes = {
        name: {"bits": scheme.bits, "group_size": scheme.group_size}
        for name, scheme in schemes.items()
        if scheme != commonest
    }
    dynamic: dict[str, dict[str, int]] = {f"+:^{re.escape(name)}$": what for name, what in _with_fused(changes).items()}
    dynamic |= {
        f"-:^{re.escape(name)}$": {} for name in _with_fused({name: {} for name in ignore}) if name != "lm_head"
    }
    return {
        "quant_method": METHOD,
        "checkpoint_format": "gptq",
        "bits": commonest.bits,
        "group_size": commonest.group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        **({"dynamic": dynamic} if dynamic else {}),
    }


def read_inputs(config: Mapping[str, Any]) -> ActivationScheme | None:
    """Return None: the layout has no field for inputs that are rounded; see `Layout`."""
    return None


def read_schemes(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, LayerScheme]:
    """Read the schemes of layers from a `quantization_config` that `quantization_config` wrote.

    Args:
        config: The `quantization_config` of config.json.
        names: Module names of the packed layers.

    Raises:
        CheckpointError: The config is of another layout, or says that a packed layer is not packed.
    """
    kind = (config["quant_method"], config["checkpoint_format"], config["sym"], config["desc_act"])
    if kind != (METHOD, "gptq", True, False):
        raise CheckpointError(f"expected gptq, version 1, symmetric, desc_act false, got {kind}")
    dynamic, excluded = config.get("dynamic", {}), _excluded(config)
    changed = [(re.compile(key[2:]), changes) for key, changes in dynamic.items() if not key.startswith("-:")]
    by_name = {}
    for name in names:
        if excluded.match(name):
            raise CheckpointError(f"dynamic excludes {name}, but it is packed")
        fields = {"bits": config["bits"], "group_size": config["group_size"]}
        for pattern, changes in changed:
            if pattern.match(name):
                fields |= changes
        by_name[name] = LayerScheme(**fields)
    return by_name


def is_ignored(config: Mapping[str, Any], name: str) -> bool:
    """Tell whether a `quantization_config` says that a linear module is not packed; see `Layout`."""
    if f"-:^{re.escape(name)}$" in config.get("dynamic", {}):  # as it is written here, for thousands of names
        return True
    return (name == "lm_head" and not config["lm_head"]) or bool(_excluded(config).match(name))


def fusion_refusal(schemes: Mapping[str, Sequence[LayerScheme]], ignore: Sequence[str]) -> str | None:
    """Say which layers would make a model that vLLM cannot load: it knows one scheme of fused layers; see `Layout`."""
    return next(iter(mixed_layers(schemes, ignore)), None)


def server_notes(schemes: Mapping[str, Sequence[LayerScheme]], ignore: Sequence[str]) -> list[str]:
    """Say what servers are known to refuse about some layers, one sentence each; see `Layout`."""
    below = "vLLM has no kernel for them in this layout; GPTQModel and transformers with it load them"
    return [*low_width_notes(schemes, below), *group_size_notes(schemes)]


def inputs_refusal(
    layers: Iterable[LinearLayer], schemes: Mapping[str, Sequence[LayerScheme]], inputs: ActivationScheme | None
) -> str | None:
    """Say that the layout has no field for rounded inputs, whatever the layers; see `Layout`."""
    return f"inputs as {inputs.in_words}: the GPTQ layout cannot say so; use compressed-tensors" if inputs else None


def inputs_notes(
    layers: Iterable[LinearLayer], schemes: Mapping[str, Sequence[LayerScheme]], inputs: ActivationScheme | None
) -> list[str]:
    """Return no note, because inputs are never rounded in this layout; see `Layout`."""
    return []


def reader_notes(layers: Iterable[LinearLayer]) -> list[str]:
    """Say what transformers cannot read of some layers, or reads wrongly; see `Layout`."""
    layers, notes = list(layers), []
    if any(layer.expert is not None for layer in layers):
        notes.append(
            "experts in GPTQ layout: transformers without GPTQModel leaves them random and says nothing; serve them "
            "with vLLM or GPTQModel, or write compressed-tensors"
        )
    if any(layer.served_as for layer in layers):
        notes.append(
            "no reader of gpt-oss's packed experts is known for GPTQ layout; write compressed-tensors for vLLM"
        )
    return [*notes, *conversion_notes(layers)]


def _with_fused(by_name: Mapping[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Add what vLLM calls the layers that it fuses: it looks for these names alone, other readers for the layers'."""
    fused = {fused: value for name, value in by_name.items() if (fused := fused_name(name)) is not None}
    return {**by_name, **fused}


def _excluded(config: Mapping[str, Any]) -> re.Pattern[str]:
    """Return one pattern for all names that are not packed: experts one by one are thousands of names."""
    patterns = [f"(?:{key[2:]})" for key in config.get("dynamic", {}) if key.startswith("-:")]
    return re.compile("|".join(patterns) or r"(?!)")


def _group_of_each_column(columns: int, group_size: int) -> torch.Tensor:
    return (torch.arange(columns) // group_size).to(torch.int32)
