"""What servers and transformers refuse, or read wrongly, in any layout."""

from collections.abc import Iterable, Mapping, Sequence

from astro.activation_config import Activations, Reconstruction
from astro.config import PER_CHANNEL, SERVED_GROUP_SIZES, LayerScheme
from astro.model.linear_layer import LinearLayer

__all__ = [
    "FUSED_EXPERTS", "TRANSPOSED", "adapter_notes", "cache_notes", "conversion_notes", "group_size_notes",
    "low_width_notes", "settled",
]  # fmt: skip

FUSED_EXPERTS = (
    "the source holds its experts fused, the result one by one, as vLLM asks; transformers reads such a result of "
    "Llama 4 and of Qwen3.5-MoE, and of no other architecture that was tried"
)
TRANSPOSED = (
    "the source holds some layers transposed (Conv1D), the result as linear layers, as servers ask: transformers has "
    "no reader for them"
)


def settled(schemes: Mapping[str, Sequence[LayerScheme]]) -> list[LayerScheme]:
    """Return the schemes of the layers whose width is settled.

    Args:
        schemes: Every scheme that each quantized layer may get, by module name.
    """
    return [possible[0] for possible in schemes.values() if len(possible) == 1]


def low_width_notes(schemes: Mapping[str, Sequence[LayerScheme]], who_loads_them: str) -> list[str]:
    """Warn of widths below 4 bits.

    Args:
        schemes: Every scheme that each quantized layer may get, by module name.
        who_loads_them: What the readers of the layout make of such widths.
    """
    widths = [{scheme.bits for scheme in possible} for possible in schemes.values()]
    is_open = any(len(possible) > 1 and {2, 3} & possible for possible in widths)
    low = " and ".join(map(str, sorted({2, 3} & set().union(*widths))))
    return [f"{low}-bit weights{' (bits: auto may choose them)' if is_open else ''}: {who_loads_them}"] if low else []


def group_size_notes(schemes: Mapping[str, Sequence[LayerScheme]]) -> list[str]:
    """Warn of group sizes that vLLM's fast kernels do not take.

    Args:
        schemes: Every scheme that each quantized layer may get, by module name.
    """
    taken = {PER_CHANNEL, *SERVED_GROUP_SIZES}
    sizes = sorted({scheme.group_size for scheme in settled(schemes) if scheme.bits in (4, 8)} - taken)
    if not sizes:
        return []
    return [f"group size {', '.join(map(str, sizes))}: vLLM's CUDA Marlin kernels take only -1, 32, 64 and 128"]


def conversion_notes(layers: Iterable[LinearLayer]) -> list[str]:
    """Warn of layers that the result holds otherwise than the source, so that transformers cannot read them.

    Args:
        layers: The layers that are quantized.
    """
    layers, notes = list(layers), []
    if any(layer.is_fused for layer in layers):
        notes.append(FUSED_EXPERTS)
    if any(layer.transposed and layer.expert is None for layer in layers):
        notes.append(TRANSPOSED)
    return notes


def cache_notes(activations: Activations) -> list[str]:
    """Say which servers hold keys and values in FP8 with the scales of the result.

    Args:
        activations: What servers are told to round besides weights.
    """
    if not activations.rounds_cache:
        return []
    # Read in vLLM 0.32: `flashinfer.py`, `triton_attn.py`, `fa_utils.py`, `attention.py` and `platforms/cuda.py`.
    return [
        "activations.kv_cache fp8: by its source, vLLM 0.32 takes such a cache on CUDA GPUs of compute capability 8.0 "
        "or more by FlashInfer (A100 and newer), and of 8.9 or more by Triton; most of its kernels then round queries "
        "to FP8 too, which is not measured; its loader was tried, and no GPU; other servers were not looked at; "
        "transformers ignores the scales and rounds no keys and values"
    ]


def adapter_notes(corrections: Reconstruction, activations: Activations, architecture: str) -> list[str]:
    """Say what a server must support to add corrections of low rank, and what was tried.

    Args:
        corrections: Settings of the corrections.
        activations: What servers are told to round besides weights.
        architecture: Name of the model's class.
    """
    if not corrections.is_on:
        return []
    inputs = "" if activations.scheme is None else f", inputs in {activations.in_words}"
    limits = (
        f"servers have to support LoRA for {architecture}, and where vLLM does not, it refuses adapters; tried: vLLM "
        "0.32 on a CPU, SmolLM2 with 4-bit weights and inputs in 16 bits; not tried: GPUs, other architectures"
        f"{inputs}"
    )
    if corrections.holds_channels(activations):
        return [
            f"CAREFUL: without its adapter this model is of no use, and a server without LoRA cannot serve it; {limits}"
        ]
    return [f"reconstruction: without its adapter the model works and loses more; to add it, {limits}"]
