"""The names of everything in a result that is not quantized, as readers ask for them in the `ignore` list.

A reader takes every linear layer for packed that `ignore` does not name. transformers asks under its own names of
modules, servers under the names that the files have, and both build layers that the class here does not have: drafters
for multi-token prediction, vision towers with other classes. So every copied matrix is named, known or not.
"""

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from astro.model.experts import parts_of
from astro.model.skeleton import Skeleton
from astro.storage.shard_header import TensorEntry

__all__ = ["copied_matrices", "linear_modules", "names_beside_text_in_servers", "names_in_the_decoder_alone"]

_WEIGHT = ".weight"
_DECODER = "language_model."
"""What wrappers call their text decoder, in front of the names of its modules."""
_IN_SERVERS = {"qkv": "qkv_proj", "gate_proj": "gate_up_proj"}
"""What servers call layers of vision towers that are joined, in the file or by them; read in vLLM 0.32's GLM-4.5V and
GLM-4.1V, which find no parts of these names."""


def linear_modules(skeleton: Skeleton, layers: Iterable[str], other_matrices: Iterable[str]) -> list[str]:
    """Return transformers' names of everything that a reader may take for a linear layer.

    Args:
        skeleton: The model on the meta device.
        layers: Names of the linear layers of all blocks.
        other_matrices: Names of all other matrices of the blocks, gates among them.
    """
    modules = [name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Linear)]
    gates = [name.removesuffix(_WEIGHT) for name in other_matrices if name.endswith(_WEIGHT)]
    return list(dict.fromkeys((*modules, *layers, *gates)))


def names_in_the_decoder_alone(skeleton: Skeleton, names: Iterable[str]) -> list[str]:
    """Return what layers of a wrapper's text decoder are called where that is loaded alone, as a causal class does.

    Args:
        skeleton: The model on the meta device.
        names: Names of layers in the wrapper.
    """
    if _DECODER not in skeleton.blocks_name:
        return []
    return [name.replace(_DECODER, "", 1) for name in names if _DECODER in name]


def names_beside_text_in_servers(skeleton: Skeleton, names: Iterable[str]) -> list[str]:
    """Return what servers call layers that no text goes through, where they call them otherwise than the files.

    Args:
        skeleton: The model on the meta device.
        names: Names of layers in the model or in the files.
    """
    beside = (name for name in names if skeleton.is_beside_text(skeleton.target_of(f"{name}{_WEIGHT}")[0]))
    split = (name.rpartition(".") for name in beside)
    return [f"{parent}.{_IN_SERVERS[leaf]}" for parent, _, leaf in split if leaf in _IN_SERVERS]


def copied_matrices(skeleton: Skeleton, entries: Mapping[str, TensorEntry], keys: Iterable[str]) -> list[str]:
    """Return the files' names of every layer whose weight is copied, experts one by one.

    Tables of embeddings are left out where the model's class says that they are tables.

    Args:
        skeleton: The model on the meta device.
        entries: Tensors of the checkpoint by name.
        keys: Names of the tensors that are copied.
    """
    return list(dict.fromkeys(name for key in keys for name in _names(skeleton, key, entries[key].shape)))


def _names(skeleton: Skeleton, key: str, shape: tuple[int, ...]) -> Iterator[str]:
    stem, _, leaf = key.rpartition(".")
    if len(shape) == 3 and parts_of(leaf):  # experts that one tensor holds; readers ask for each
        yield from (f"{stem}.{expert}.{part}" for expert in range(shape[0]) for part in parts_of(leaf))
    elif len(shape) >= 2 and leaf == "weight" and not skeleton.is_table(skeleton.target_of(key)[0]):
        yield stem
