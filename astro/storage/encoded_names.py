"""Which tensors of a quantized source belong together, by their names.

| weight | scales and the like beside it |
|---|---|
| `L.weight`, or a parameter `P` | `P_scale_inv`, `P_scale`, `L.scale`, `L.qscale_weight`; `P_scale_2`, `P_zero_point` |
| `L.weight_packed` | `L.weight_scale`, `…_global_scale`, `…_zero_point`, `…_g_idx`, `…_shape` |
| `P_blocks` | `P_scales` |
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType

from astro.errors import CheckpointError
from astro.storage.encoded_tensor import EncodedTensor, Numbers
from astro.storage.shard_header import StoredTensor
from astro.storage.source_quantization import MX_GROUP, NVFP4_GROUP, SourceQuantization, WeightScheme

__all__ = ["Encoded", "find_encoded"]

_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_ACTIVATION_SCALES = (
    "input_scale", "input_zero_point", "input_global_scale", "input_scale_ub", "activation_scale", "qscale_act",
    "output_scale", "output_zero_point", "q_scale", "k_scale", "v_scale", "kv_scale", "k_zero_point", "v_zero_point",
)  # fmt: skip
"""Endings of the names of what a source keeps to quantize activations, or the cache of keys and values."""


_CHANGES_INPUTS = (".pre_quant_scale", "_pre_quant_scale")
"""Endings of the names of what a layer's inputs are multiplied by before its weight."""
_BYTES = ("I8", "U8")
_WEIGHT_ENDINGS = ("weight", "_blocks", "_proj")
"""Endings of the names of weights; other tensors of bytes may be tables or masks."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The part of a checkpoint that is decoded while it is read.

    Attributes:
        method: What the source's configuration calls its method; None where it is not quantized.
        weights: The encoded weights.
        hidden: Names of the stored tensors that no reader gets: what the weights are decoded from, and what has no use
            any more.
        num_dropped: Number of scales of activations among these.
    """

    method: str | None = None
    weights: Sequence[EncodedTensor] = ()
    hidden: Set[str] = frozenset()
    num_dropped: int = 0


def find_encoded(
    stored: Mapping[str, StoredTensor],
    quantization: SourceQuantization,
    packed_shapes: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> Encoded:
    """Find the weights that a source stores as numbers and scales.

    Args:
        stored: Every tensor of the source by name.
        quantization: How the source is quantized.
        packed_shapes: Rows and columns of packed weights by the name of their layer, where the source says them.

    Raises:
        CheckpointError: A weight has no scales, or tensors do not fit each other.
    """
    weights = []
    for name, tensor in stored.items():
        stem, _, ending = name.rpartition(".")
        if ending == "weight_packed":
            encoded = _packed(stem, stored, quantization.scheme_of(stem), packed_shapes.get(stem))
        elif name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in stored:
            encoded = _blocks(name.removesuffix("_blocks"), stored)
        elif tensor.dtype in (*_FLOAT8, *_BYTES):
            encoded = _scaled(name, stored, quantization)
        else:
            continue
        if encoded is not None:
            weights.append(encoded.checked())
    used = {part.name for weight in weights for part in weight.sources}
    for weight in weights:
        if weight.name in stored and weight.name not in used:
            raise CheckpointError(f"{weight.file}: tensor {weight.name} is there beside {weight.parts['weight'].name}")
    for name, tensor in stored.items():
        _require_decoded(name, tensor, used)
    names = {weight.name for weight in weights}
    dropped = [name for name, tensor in stored.items() if _is_activation_scale(name, tensor, names)]
    shapes = [f"{weight.name}_shape" for weight in weights if f"{weight.name}_shape" in stored]
    return Encoded(quantization.method, tuple(weights), frozenset(used) | {*dropped, *shapes}, len(dropped))


def _packed(
    stem: str, stored: Mapping[str, StoredTensor], scheme: WeightScheme, shape: tuple[int, int] | None
) -> EncodedTensor | None:
    """A weight of compressed-tensors: 4-bit floats in bytes, or integers in words."""
    packed, scale = stored[f"{stem}.weight_packed"], stored.get(f"{stem}.weight_scale")
    if scale is None:
        raise CheckpointError(f"{packed.file}: tensor {packed.name} is packed, but there is no {stem}.weight_scale")
    if len(packed.shape) != 2:
        raise CheckpointError(
            f"{packed.file}: tensor {packed.name} is {list(packed.shape)}; packed weights are decoded from matrices "
            "alone, give the original 16-bit checkpoint"
        )
    names = {"global_scale": "weight_global_scale", "zero_point": "weight_zero_point", "column_group": "weight_g_idx"}
    parts = {"weight": packed, "scale": scale}
    parts |= {role: stored[f"{stem}.{name}"] for role, name in names.items() if f"{stem}.{name}" in stored}
    rows, words = packed.shape
    if packed.dtype == "U8":
        if scale.dtype in _FLOAT8 and "global_scale" not in parts:
            raise CheckpointError(
                f"{packed.file}: tensor {packed.name} is NVFP4, but there is no {stem}.weight_global_scale; the "
                "checkpoint is incomplete, fetch it again"
            )
        return _encoded(f"{stem}.weight", (rows, 2 * words), Numbers.FLOAT4, scheme, parts)
    bits = scheme.bits or 4
    if shape is None:
        shape = rows, scale.shape[-1] * scheme.block[1] if scheme.block else words * 32 // bits
    if shape[0] != rows:
        raise CheckpointError(
            f"{packed.file}: tensor {packed.name} is {list(packed.shape)}, but {stem}.weight_shape says "
            f"{list(shape)}: expected {shape[0]} rows"
        )
    return _encoded(f"{stem}.weight", shape, Numbers.PACKED, scheme, parts)


def _blocks(name: str, stored: Mapping[str, StoredTensor]) -> EncodedTensor | None:
    """Experts of GPT-OSS: numbers [E, R, G, 16], scales [E, R, G] and a weight [E, 32 G, R]."""
    weight, scale = stored[f"{name}_blocks"], stored[f"{name}_scales"]
    if weight.dtype != "U8" or len(weight.shape) != 4 or 2 * weight.shape[3] != MX_GROUP:
        return None
    experts, rows, groups, _ = weight.shape
    scheme, parts = WeightScheme(4, (1, MX_GROUP)), {"weight": weight, "scale": scale}
    encoded = _encoded(name, (experts, groups * MX_GROUP, rows), Numbers.FLOAT4, scheme, parts)
    return dataclasses.replace(encoded, transposed=True)


def _scaled(name: str, stored: Mapping[str, StoredTensor], quantization: SourceQuantization) -> EncodedTensor | None:
    """A weight one number a byte, or two, with scales under another ending; None where it has no scales."""
    weight, stem = stored[name], name.removesuffix(".weight")
    candidates = [f"{name}_scale_inv", f"{name}_scale"]
    candidates += [f"{stem}.scale", f"{stem}.qscale_weight"] if stem != name else []
    scale = next((stored[candidate] for candidate in candidates if candidate in stored), None)
    if scale is None or len(weight.shape) < 2:
        return None
    scheme = quantization.scheme_of(stem)
    parts = {"weight": weight, "scale": scale}
    if f"{name}_zero_point" in stored:
        parts["zero_point"] = stored[f"{name}_zero_point"]
    doubled = (*weight.shape[:-1], 2 * weight.shape[-1])
    if f"{name}_scale_2" in stored:  # NVFP4 of ModelOpt
        parts["global_scale"] = stored[f"{name}_scale_2"]
        return _encoded(name, doubled, Numbers.FLOAT4, WeightScheme(4, (1, NVFP4_GROUP)), parts)
    if weight.dtype not in _FLOAT8 and scale.dtype in ("F8_E8M0", "U8"):  # experts of DeepSeek-V4
        return _encoded(name, doubled, Numbers.FLOAT4, WeightScheme(4, (1, MX_GROUP)), parts)
    if weight.dtype == "U8":
        raise CheckpointError(
            f"{weight.file}: tensor {name} holds bytes in a format that is not known here: {scale.name} is "
            f"{scale.dtype} {list(scale.shape)}, and there is no {name}_scale_2 as in NVFP4; give the original 16-bit "
            "checkpoint"
        )
    numbers = Numbers.FLOAT8 if weight.dtype in _FLOAT8 else Numbers.INT8
    return _encoded(name, weight.shape, numbers, dataclasses.replace(scheme, bits=8), parts)


def _encoded(
    name: str, shape: tuple[int, ...], numbers: Numbers, scheme: WeightScheme, parts: Mapping[str, StoredTensor]
) -> EncodedTensor:
    if not scheme.symmetric and "zero_point" not in parts and numbers in (Numbers.INT8, Numbers.PACKED):
        raise CheckpointError(
            f"{parts['weight'].file}: tensor {parts['weight'].name} is asymmetric by config.json, but there is no "
            f"{name}_zero_point; the checkpoint is incomplete, fetch it again"
        )
    # A model of float16 stores its scales in it, and its weights lie within its range.
    dtype = "F16" if parts["scale"].dtype == "F16" else "BF16"
    bits = 4 if numbers is Numbers.FLOAT4 else scheme.bits or 8
    divides = parts["weight"].name.endswith("weight_packed")
    return EncodedTensor(
        name, parts["weight"].file, dtype, tuple(shape), numbers, bits, scheme.block, dict(parts), divides=divides
    )


def _require_decoded(name: str, tensor: StoredTensor, used: Set[str]) -> None:
    """Refuse a tensor that would be taken for a weight as it is, or whose part in a weight is not known."""
    if name.endswith(_CHANGES_INPUTS):
        raise CheckpointError(
            f"{tensor.file}: tensor {name} scales the inputs of a layer, and its weight is stored for such inputs "
            "(AWQ of ModelOpt), which is not decoded here; give the original 16-bit checkpoint"
        )
    is_weight = tensor.dtype in _BYTES and len(tensor.shape) > 1 and name.endswith(_WEIGHT_ENDINGS)
    if (tensor.dtype in _FLOAT8 or is_weight) and name not in used:
        expected = f"{name.removesuffix('_blocks')}_scales" if name.endswith("_blocks") else f"{name}_scale"
        raise CheckpointError(
            f"{tensor.file}: tensor {name} is stored as {tensor.dtype}, but there is no scale beside it "
            f"(expected {expected}{'' if name.endswith('_blocks') else f' or {name}_scale_inv'}); the checkpoint is "
            "incomplete, fetch it again"
        )


def _is_activation_scale(name: str, tensor: StoredTensor, weights: Set[str]) -> bool:
    """Tell whether a tensor is for activations: by its name, if it is one number or lies beside an encoded weight."""
    stem, _, last = name.rpartition(".")
    if last in _ACTIVATION_SCALES and (math.prod(tensor.shape) == 1 or f"{stem}.weight" in weights):
        return True
    return any(name.removesuffix(f"_{ending}") in weights for ending in _ACTIVATION_SCALES if name.endswith(ending))
