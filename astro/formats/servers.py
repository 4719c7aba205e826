"""What servers ask of any layout."""

from collections.abc import Mapping, Sequence

from astro.config import PER_CHANNEL, Quantization

__all__ = ["group_size_notes", "low_width_notes", "mixed_fusion_notes"]

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that vLLM makes one of."""
_MARLIN_SIZES = (PER_CHANNEL, 32, 64, 128)


def low_width_notes(settings: Mapping[str, Quantization], who_loads_them: str) -> list[str]:
    """Widths below 4 bits, and what a layout's readers make of them."""
    widths = sorted({own.width for own in settings.values() if own.bits in (2, 3)})
    return [f"{' and '.join(map(str, widths))}-bit weights: {who_loads_them}"] if widths else []


def group_size_notes(settings: Mapping[str, Quantization]) -> list[str]:
    """Group sizes that vLLM's fast kernels do not take."""
    sizes = sorted({own.group_size for own in settings.values() if own.bits in (4, 8)} - set(_MARLIN_SIZES))
    if not sizes:
        return []
    return [f"group size {', '.join(map(str, sizes))}: vLLM's CUDA Marlin kernels take only -1, 32, 64 and 128"]


def mixed_fusion_notes(settings: Mapping[str, Quantization], ignore: Sequence[str]) -> list[str]:
    """Layers that servers fuse although their settings differ."""
    mixed = _mixed_fusion({**dict.fromkeys(ignore), **settings})
    if mixed is None:
        return []
    return [
        f"{mixed} differ in width, group size or symmetry, or not all are quantized: vLLM fuses them and refuses such "
        "a model"
    ]


def _mixed_fusion(settings: Mapping[str, Quantization | None]) -> str | None:
    """The first such layers; None is not quantized."""
    for name, own in settings.items():
        parent, _, leaf = name.rpartition(".")
        for fused in _FUSED:
            members = [f"{parent}.{member}" for member in fused if f"{parent}.{member}" in settings]
            if leaf == fused[0] and any(settings[member] != own for member in members):
                return " and ".join(members)
    return None
