"""Checkpoints as they lie on the Hub in FP8, MXFP4, NVFP4 and packed integers, made of 16-bit ones, and their decoding.

Encoders take a weight and return its stored tensors by the ending of their names, and the weight in float64 as these
stand for it, computed element by element in the simplest way.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from astro.storage.atomic import read_json, write_json
from astro.storage.checkpoint import INDEX_NAME

__all__ = ["E2M1", "SOURCES", "Encoder", "fp4", "fp8", "integers", "mxfp4_experts", "write_source"]

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
"""The values of the sixteen 4-bit floats."""

Encoder = Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], np.ndarray]]


def fp8(W: torch.Tensor, block: tuple[int, int] | None, as_exponents: bool = False) -> tuple[dict[str, Any], Any]:
    """Round to FP8 with a scale for each block, or for each row; `as_exponents` makes the scales powers of two."""
    rows, columns = W.shape
    b_R, b_C = block or (1, columns)
    scales = torch.empty(-(-rows // b_R), -(-columns // b_C))
    Q, W64 = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), np.empty((rows, columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = slice(i * b_R, (i + 1) * b_R), slice(j * b_C, (j + 1) * b_C)
            scale = W[where].float().abs().max().clamp(min=1e-12) / 448
            scale = torch.exp2(torch.ceil(torch.log2(scale))) if as_exponents else scale
            scales[i, j] = scale
            Q[where] = (W[where].float() / scale).to(torch.float8_e4m3fn)
            W64[where] = Q[where].double().numpy() * float(scale)
    return {"weight": Q, "scale": scales.to(torch.float8_e8m0fnu) if as_exponents else scales}, W64


def fp4(W: torch.Tensor, group: int) -> tuple[dict[str, Any], Any]:
    """Round to 4-bit floats, two in a byte, with a power of two for each group; [..., C] gives bytes [..., C / 2]."""
    groups = W.float().unflatten(-1, (-1, group))
    exponents = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=1e-30))).int() - 2 + 127
    codes = (groups / torch.exp2(exponents.float() - 127)[..., None])[..., None] - torch.tensor(E2M1)
    codes = codes.abs().argmin(-1).to(torch.uint8)
    packed = (codes[..., 0::2] | (codes[..., 1::2] << 4)).flatten(-2)
    W64 = np.array(E2M1)[codes.numpy()] * 2.0 ** (exponents.numpy().astype(float) - 127)[..., None]
    return {"weight": packed, "scale": exponents.to(torch.uint8)}, W64.reshape(W.shape)


def mxfp4_experts(W: torch.Tensor) -> tuple[dict[str, Any], Any]:
    """Store experts [E, C, R] as GPT-OSS does: blocks [E, R, C / 32, 16] and scales [E, R, C / 32]."""
    stored, W64 = fp4(W.transpose(1, 2).contiguous(), 32)
    stored = {"blocks": stored["weight"].unflatten(-1, (-1, 16)).contiguous(), "scales": stored["scale"]}
    return stored, W64.transpose(0, 2, 1)


def integers(W: torch.Tensor, bits: int, group: int, symmetric: bool = True) -> tuple[dict[str, Any], Any]:
    """Round to integers in words, as compressed-tensors packs them. Scales are bfloat16; groups may end early."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    rows, columns = W.shape
    groups = torch.nn.functional.pad(W.float(), (0, -columns % group)).reshape(rows, -1, group)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if symmetric:
        scale, zero = groups.abs().amax(-1) / high, torch.zeros(rows, groups.shape[1])
    else:
        scale = (groups.amax(-1) - groups.amin(-1)) / (high - low)
        zero = (low - groups.amin(-1) / scale).round().clamp(low, high)
    scale = scale.clamp(min=1e-6).bfloat16()
    Q = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(low, high)
    W64 = (Q.double() - zero[..., None]).numpy() * scale.double().numpy()[..., None]
    stored = {
        "weight_packed": pack_to_int32(Q.flatten(1)[:, :columns].to(torch.int8).contiguous(), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        stored["weight_zero_point"] = pack_to_int32(zero.to(torch.int8), bits, packed_dim=0).contiguous()
    return stored, W64.reshape(rows, -1)[:, :columns]


def _is_linear(name: str) -> bool:
    outside = ("embed_tokens", "lm_head", "norm", "mlp.gate.weight", "router")
    return name.endswith(".weight") and not any(part in name for part in outside)


def _fp8_blocks(name: str, W: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any] | None:
    if not _is_linear(name):
        return None
    stored, W64 = fp8(W, (48, 48))
    return {name: stored["weight"], f"{name}_scale_inv": stored["scale"]}, W64


def _fp8_exponents(name: str, W: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any] | None:
    if not _is_linear(name):
        return None
    stored, W64 = fp8(W, (48, 48), as_exponents=True)
    return {name: stored["weight"], f"{name.removesuffix('weight')}scale": stored["scale"]}, W64


def _fp8_channels(name: str, W: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any] | None:
    if not _is_linear(name):
        return None
    stored, W64 = fp8(W, None)
    extra = {f"{name.removesuffix('weight')}input_scale": torch.ones(1)}
    return {name: stored["weight"], f"{name}_scale": stored["scale"], **extra}, W64


def _mxfp4(name: str, W: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any] | None:
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return None
    stored, W64 = mxfp4_experts(W)
    return {f"{name}_{ending}": tensor for ending, tensor in stored.items()}, W64


def _int4(name: str, W: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any] | None:
    if ".mlp.experts." not in name:
        return None
    stored, W64 = integers(W, 4, 32)
    return {f"{name.removesuffix('weight')}{ending}": tensor for ending, tensor in stored.items()}, W64


def _nvfp4(name: str, W: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any] | None:
    if not _is_linear(name):
        return None
    stored, W64 = fp4(W * 8, 16)
    scale = torch.exp2(stored["scale"].float() - 127).to(torch.float8_e4m3fn)
    names = {"weight_packed": stored["weight"], "weight_scale": scale, "weight_global_scale": torch.tensor([8.0])}
    assert bool((scale.float() == torch.exp2(stored["scale"].float() - 127)).all())
    return {f"{name.removesuffix('weight')}{ending}": tensor for ending, tensor in names.items()}, W64 / 8


def _groups(form: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip


SOURCES: dict[str, tuple[Callable[[str, torch.Tensor], Any], dict[str, Any]]] = {
    "fp8-blocks": (
        _fp8_blocks,
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [48, 48]},
    ),
    "fp8-exponents": (
        _fp8_exponents,
        {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [48, 48]},
    ),
    "fp8-channels": (
        _fp8_channels,
        _groups("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}),
    ),
    "mxfp4": (_mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}),
    "int4": (
        _int4,
        _groups(
            "pack-quantized",
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
        ),
    ),
    "nvfp4": (
        _nvfp4,
        _groups(
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True},
        ),
    ),
}
"""How each kind of source stores a tensor (None: as it is), and its quantization_config."""


def write_source(model: Path, kind: str, encoded: Path, decoded: Path, section: str | None = None) -> None:
    """Write a 16-bit checkpoint as a quantized source of a kind, and the same weights in 16 bits beside it.

    Args:
        model: Folder of the 16-bit checkpoint.
        kind: Kind of the source, a key of `SOURCES`.
        encoded: Folder that gets the quantized source, in two shards.
        decoded: Folder that gets its weights in bfloat16, in one shard. Layers that stay in 16 bits are the same.
        section: Section of config.json that gets the quantization_config; None for its top.
    """
    encode, quantization = SOURCES[kind]
    tensors = {name: t for path in sorted(model.glob("*.safetensors")) for name, t in load_file(path).items()}
    stored: dict[str, torch.Tensor] = {}
    plain = dict(tensors)
    for name, W in tensors.items():
        coded = encode(name, W)
        stored |= {name: W} if coded is None else coded[0]
        if coded is not None:
            plain[name] = torch.from_numpy(np.ascontiguousarray(coded[1])).float().bfloat16()
    for folder in (encoded, decoded):
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX_NAME))
    save_file(plain, decoded / "model.safetensors", {"format": "pt"})
    names = sorted(stored)
    files = {name: f"model-{1 + (2 * i >= len(names)):05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: stored[n].contiguous() for n in names if files[n] == file}, encoded / file, {"format": "pt"})
    write_json(encoded / INDEX_NAME, {"metadata": {}, "weight_map": files})
    config = read_json(encoded / "config.json")
    (config.setdefault(section, {}) if section else config)["quantization_config"] = quantization
    write_json(encoded / "config.json", config)
