"""What servers and transformers refuse, or read wrongly, in any layout."""

from collections.abc import Iterable, Mapping, Sequence

from astro.config import PER_CHANNEL, SERVED_GROUP_SIZES, LayerScheme
from astro.model.linear_layer import LinearLayer

__all__ = ["FUSED_EXPERTS", "TRANSPOSED", "conversion_notes", "group_size_notes", "low_width_notes", "settled"]

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
