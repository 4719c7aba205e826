"""How wide packed weights are: the sizes that compressed-tensors stores beside them.

A row of packed integers fills whole words, so that the number of words does not tell the number of columns. It is
stored in `weight_shape`, which is read while a source is opened. One is read for all layers whose names differ by
numbers alone and whose packed sizes are the same: a model has tens of thousands of experts, and each read of a remote
file is a request. A width that is not the model's would be refused when the weight is loaded.
"""

import re
from collections.abc import Mapping

from astro.errors import CheckpointError
from astro.storage.byte_store import Store
from astro.storage.shard_header import StoredTensor

__all__ = ["read_packed_shapes"]

_ENDING = ".weight_shape"
_NUMBER = re.compile(r"\d+")


def read_packed_shapes(store: Store, stored: Mapping[str, StoredTensor]) -> dict[str, tuple[int, int]]:
    """Read rows and columns of the packed weights.

    Args:
        store: Where the files are.
        stored: Every tensor of the source by name.

    Returns:
        Rows and columns by the name of the layer, where the files say them.

    Raises:
        CheckpointError: A stored shape is no pair of sizes.
    """
    kinds: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in stored:
        layer = name.removesuffix(_ENDING)
        packed = stored.get(f"{layer}.weight_packed")
        if name.endswith(_ENDING) and packed is not None and len(packed.shape) == 2:
            kinds.setdefault((_NUMBER.sub("", layer), packed.shape), []).append(layer)
    firsts = [stored[f"{layers[0]}{_ENDING}"] for layers in kinds.values()]
    reads = [entry.to_read() for entry in firsts]
    store.fill([span for _, span in reads])
    shapes: dict[str, tuple[int, int]] = {}
    for entry, (tensor, _), layers in zip(firsts, reads, kinds.values(), strict=True):
        sizes = tensor.flatten().tolist()
        if len(sizes) != 2 or not all(size == int(size) and size > 0 for size in sizes):
            raise CheckpointError(f"{entry.file}: tensor {entry.name} holds {sizes}: expected rows and columns")
        shapes |= dict.fromkeys(layers, (int(sizes[0]), int(sizes[1])))
    return shapes
