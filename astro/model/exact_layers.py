"""Linear layers that stay in 16 bits because servers hold them so, although they could be quantized.

Read in the source of vLLM 0.32: each of these is built there with `quant_config=None`, or joined with one that is.
Routers and other gates are found by their shapes (`is_gate` in `experts.py`); convolutions, hash routers and
hyper-connections are no linear layers, and are never quantized.
"""

from torch import nn

__all__ = ["is_held_exact"]

_INDEXER = ("wk", "weights_proj")
"""Layers of the indexer of sparse attention that servers join and keep; `wq_b` is served packed."""
_COMPRESSOR = ("kv_proj", "gate_proj", "wkv", "wgate")
"""Layers that compress the keys and values of sparse attention."""
_DELTA_GATES = ("in_proj_a", "in_proj_b", "in_proj_ba")
"""Layers that give a gated DeltaNet one number for each head: tiny, and no multiple of what kernels ask for."""


def is_held_exact(name: str, parent: nn.Module) -> bool:
    """Tell whether servers hold a linear layer in 16 bits.

    Args:
        name: Name of the layer in the model.
        parent: The module that holds the layer.
    """
    *path, leaf = name.split(".")
    if leaf == "weights_proj" or (leaf in _INDEXER and "indexer" in path):
        return True
    if leaf in _COMPRESSOR and "compressor" in path:
        return True
    return leaf in _DELTA_GATES or _is_first_mamba(parent)


def _is_first_mamba(parent: nn.Module) -> bool:
    """Tell whether a module is a mixer of the first Mamba, whose steps have a projection of their own."""
    children = dict(parent.named_children())
    return all(isinstance(children.get(name), nn.Linear) for name in ("x_proj", "dt_proj"))
