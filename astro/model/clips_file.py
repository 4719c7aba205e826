"""The file beside the weights of a model with the clips that training learned for the inputs of layers.

For each layer `NAME.input_clips`, float32 [2] with c⁻ and c⁺. The header's metadata tells `bits`, the width that they
were learned for.
"""

import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save_file

from astro.errors import CheckpointError
from astro.storage.atomic import write_atomic
from astro.storage.byte_store import Store
from astro.storage.shard_header import read_bytes, read_store_header

__all__ = ["CLIPS_FILE", "StoredClips", "read_clips", "write_clips"]

CLIPS_FILE = "activation_clips.safetensors"
"""Name of the file."""
_KEY_SUFFIX = ".input_clips"


@dataclasses.dataclass(frozen=True)
class StoredClips:
    """What such a file holds.

    Attributes:
        by_layer: Clips c⁻ and c⁺, float32 [2], by the name of the layer in the model.
        bits: Width that they were learned for.
    """

    by_layer: Mapping[str, torch.Tensor]
    bits: int


def write_clips(path: Path, by_layer: Mapping[str, torch.Tensor], bits: int) -> None:
    """Write the clips of layers.

    Args:
        path: Path of the file, see `CLIPS_FILE`.
        by_layer: Clips c⁻ and c⁺ [2], by the name of the layer in the model.
        bits: Width that they were learned for.

    Raises:
        StorageError: The file cannot be written.
    """
    tensors = {f"{name}{_KEY_SUFFIX}": clips.float().cpu().clone() for name, clips in by_layer.items()}
    write_atomic(path, lambda partial: save_file(tensors, partial, {"bits": str(bits)}))


def read_clips(store: Store, file: str) -> StoredClips:
    """Read the clips of layers.

    Args:
        store: Where the file is.
        file: Name of the file, see `CLIPS_FILE`.

    Raises:
        CheckpointError: The file is missing or damaged, or holds something else.
    """
    path, sizes = f"{store}/{file}", store.sizes()
    if file not in sizes:
        raise CheckpointError(f"{path}: is not there; `astro-dist train` writes it beside the weights")
    read_store_header(store, sizes, file)  # refuses a damaged file
    content = read_bytes(store, file, 0, sizes[file])
    metadata = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]]).get("__metadata__") or {}
    bits = metadata.get("bits", "")
    if not bits.isdecimal():
        raise CheckpointError(f"{path}: its metadata should tell the `bits` that clips were learned for, got {bits!r}")
    tensors = load(content)
    for name, tensor in tensors.items():
        if not name.endswith(_KEY_SUFFIX) or tensor.shape != (2,):
            raise CheckpointError(f"{path}: expected tensors NAME{_KEY_SUFFIX} of [2], got {name} {list(tensor.shape)}")
    return StoredClips({name.removesuffix(_KEY_SUFFIX): each.float() for name, each in tensors.items()}, int(bits))
