"""What servers ask of any layout."""

from collections.abc import Iterable, Mapping, Sequence

from astro.config import PER_CHANNEL, Quantization
from astro.model.experts import expert_group
from astro.model.linear_layer import LinearLayer

__all__ = ["group_size_notes", "low_width_notes", "mixed_fusion_notes", "reader_notes"]

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Layers that vLLM makes one of."""
_MARLIN_SIZES = (PER_CHANNEL, 32, 64, 128)


def low_width_notes(settings: Mapping[str, Quantization], who_loads_them: str) -> list[str]:
    """Widths below 4 bits, and what a layout's readers make of them."""
    is_open = any(own.bits == "auto" and {2, 3} & set(own.bit_choices) for own in settings.values())
    possible = (own.bit_choices if own.bits == "auto" else (own.bits,) for own in settings.values())
    low = " and ".join(map(str, sorted({2, 3} & set().union(*possible))))
    return [f"{low}-bit weights{' (bits: auto may choose them)' if is_open else ''}: {who_loads_them}"] if low else []


def group_size_notes(settings: Mapping[str, Quantization]) -> list[str]:
    """Group sizes that vLLM's fast kernels do not take."""
    sizes = sorted({own.group_size for own in settings.values() if own.bits in (4, 8)} - set(_MARLIN_SIZES))
    if not sizes:
        return []
    return [f"group size {', '.join(map(str, sizes))}: vLLM's CUDA Marlin kernels take only -1, 32, 64 and 128"]


def mixed_fusion_notes(settings: Mapping[str, Quantization], ignore: Sequence[str]) -> list[str]:
    """Layers that servers fuse although their settings differ."""
    known = {**dict.fromkeys(ignore), **settings}
    found = [(layers, "fuses them") for layers in _mixed_fusion(known)[:1]]
    found += [(f"the experts of {layer}", "holds them as one") for layer in _mixed_experts(known)[:1]]
    return [
        f"{layers} differ in width, group size or symmetry, or not all are quantized: vLLM {reason} and refuses such a "
        "model"
        for layers, reason in found
    ]


def reader_notes(layers: Iterable[LinearLayer], layout: str) -> list[str]:
    """Layers that transformers cannot read from a layout, or reads wrongly, whatever their settings."""
    layers = list(layers)
    experts = [layer for layer in layers if layer.expert is not None]
    notes = []
    if layout == "gptq" and experts:
        notes.append(
            "experts in GPTQ layout: transformers without GPTQModel leaves them random and says nothing; serve them "
            "with vLLM or GPTQModel, or write compressed-tensors"
        )
    if any(layer.is_fused for layer in experts):
        notes.append(
            "the source holds its experts fused, the result one by one, as servers ask: of such architectures "
            "transformers has a reader of packed experts for Llama 4 alone"
        )
    if any(layer.transposed and layer.expert is None for layer in layers):
        notes.append(
            "the source holds some layers transposed (Conv1D), the result as linear layers, as servers ask: "
            "transformers has no reader for them"
        )
    return notes


def _mixed_fusion(settings: Mapping[str, Quantization | None]) -> list[str]:
    """Such layers; None is not quantized."""
    mixed = []
    for name, own in settings.items():
        parent, _, leaf = name.rpartition(".")
        for fused in _FUSED:
            members = [f"{parent}.{member}" for member in fused if f"{parent}.{member}" in settings]
            if leaf == fused[0] and any(settings[member] != own for member in members):
                mixed.append(" and ".join(members))
    return mixed


def _mixed_experts(settings: Mapping[str, Quantization | None]) -> list[str]:
    first: dict[str, Quantization | None] = {}
    groups = ((expert_group(name), own) for name, own in settings.items())
    return [group for group, own in groups if group is not None and first.setdefault(group, own) != own]
