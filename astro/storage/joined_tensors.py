"""Several safetensors files copied into one, without any tensor in memory."""

import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from astro.errors import CheckpointError
from astro.storage.atomic import write_atomic
from astro.storage.shard_header import StoredTensor, read_header

__all__ = ["join_tensors"]

_ALIGNMENT = 8
"""The header's length is a multiple of so many bytes, as safetensors itself writes it."""
_PIECE_BYTES = 1 << 24


def join_tensors(path: Path, parts: Sequence[Path]) -> list[StoredTensor]:
    """Write the tensors of several files into one, atomically.

    Args:
        path: Where the joined file belongs.
        parts: The files, none of which holds a tensor of another. Their tensors follow each other in this order.

    Returns:
        Every tensor as it lies in the file that it came from.

    Raises:
        CheckpointError: A file is missing or damaged, or two of them hold a tensor of one name.
        StorageError: The file system refused.
    """
    tensors = [(part, tensor) for part in parts for tensor in _in_order(read_header(part.parent, part.name))]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for part, tensor in tensors:
        if tensor.name in header:
            raise CheckpointError(f"{part}: tensor {tensor.name} is in another of the files that are joined too")
        stop = start + tensor.size_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)

    def write(partial: Path) -> None:
        with partial.open("wb") as target:
            target.write(struct.pack("<Q", len(raw)) + raw)
            for part in parts:
                with part.open("rb") as source:
                    _skip_header(source)
                    shutil.copyfileobj(source, target, _PIECE_BYTES)

    write_atomic(path, write)
    return [tensor for _, tensor in tensors]


def _in_order(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """Sort tensors as they lie in their file, where they follow each other without holes."""
    return sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop))


def _skip_header(source: BinaryIO) -> None:
    source.seek(8 + struct.unpack("<Q", source.read(8))[0])
