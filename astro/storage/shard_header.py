"""The header of a safetensors shard: which tensors it holds, and where."""

import dataclasses
import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from astro.errors import CheckpointError, UnsupportedError
from astro.storage.byte_store import FolderStore, Range, Store
from astro.storage.other_kinds import LFS_POINTER

__all__ = ["StoredTensor", "TensorEntry", "read_bytes", "read_header", "read_store_header"]

_MAX_HEADER_BYTES = 100_000_000
_HEAD_BYTES = 1 << 18

_TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_NOT_READ = ("F4", "F6_E2M3", "F6_E3M2")
"""Dtypes of safetensors whose values share bytes, which torch has no dtype for."""
_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint as a reader of the checkpoint gets it.

    Attributes:
        name: Name of the tensor in the checkpoint.
        file: Name of the shard that holds it.
        dtype: Dtype as safetensors writes it, e.g. "BF16".
        shape: Sizes of the tensor.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Size of the tensor in memory, in bytes."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the tensor in torch."""
        return _TORCH_DTYPES[self.dtype]

    @property
    def float_dtype(self) -> torch.dtype | None:
        """Dtype of the tensor in torch; None where the tensor is no plain float."""
        return self.torch_dtype if self.dtype in _FLOATS else None


@dataclasses.dataclass(frozen=True)
class StoredTensor(TensorEntry):
    """A tensor as it lies in a file.

    Attributes:
        start: Offset of its first byte in the file.
    """

    start: int

    @property
    def stop(self) -> int:
        """Offset behind its last byte in the file."""
        return self.start + self.size_bytes

    def rows_to_read(self, first: int, last: int) -> tuple[torch.Tensor, Range]:
        """Return memory for some slices along the first dimension, and the range of bytes that fills it.

        Args:
            first: Index of the first slice; of a tensor without dimensions, 0.
            last: Index behind the last slice; of a tensor without dimensions, 1.

        Returns:
            An empty tensor on the CPU, and the range of the file that is read into it.
        """
        row_bytes = self.size_bytes // max(self.shape[0], 1) if self.shape else self.size_bytes
        raw = torch.empty((last - first) * row_bytes, dtype=torch.uint8)
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        span = Range(self.file, self.start + first * row_bytes, raw.numpy().data)
        return raw.view(self.torch_dtype).reshape(shape), span

    def to_read(self) -> tuple[torch.Tensor, Range]:
        """Return memory for the whole tensor, and the range of bytes that fills it."""
        return self.rows_to_read(0, self.shape[0] if self.shape else 1)


def read_header(folder: Path, file: str) -> list[StoredTensor]:
    """Read which tensors a shard in a folder holds, from its header; the file's length must agree with it.

    Args:
        folder: The folder.
        file: Name of the shard in it.

    Raises:
        CheckpointError: The shard is missing, cut short or damaged.
    """
    store = FolderStore(folder)
    return read_store_header(store, store.sizes(), file)


def read_store_header(store: Store, sizes: Mapping[str, int], file: str) -> list[StoredTensor]:
    """Read which tensors a shard in a store holds, from its header; the file's length must agree with it.

    Args:
        store: Where the files are.
        sizes: Size of every file of the store in bytes, by name.
        file: Name of the shard.

    Raises:
        CheckpointError: The shard is missing, cut short or damaged.
        UnsupportedError: The shard holds a tensor of a dtype that cannot be read.
    """
    path, size = f"{store}/{file}", sizes.get(file)
    if size is None:
        raise CheckpointError(f"{path}: the index names this shard, but it is missing; fetch it again")
    # A short header is read in one piece with its length: every request to a remote store takes its time.
    head = read_bytes(store, file, 0, min(size, _HEAD_BYTES))
    if head.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{path}: is a pointer of git-lfs, not the shard; run `git lfs pull` in the folder, or fetch it with "
            "`hf download`"
        )
    length = struct.unpack("<Q", head[:8])[0] if size >= 8 else _MAX_HEADER_BYTES + 1
    if length > min(_MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{path}: no safetensors file, or cut short: {size} bytes, its header asks for more")
    missing = 8 + length - len(head)
    raw = (head + read_bytes(store, file, len(head), missing) if missing > 0 else head)[8 : 8 + length]
    try:
        header = json.loads(raw)
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        entries = [_parse_entry(store, file, name, value, 8 + length) for name, value in tensors.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its safetensors header is damaged: {error!r:.200}; fetch it again") from error
    needed = _require_contiguous(path, entries, 8 + length)
    if size != needed:
        kind = "cut short" if size < needed else "longer than its header says"
        raise CheckpointError(f"{path}: the shard is {kind}: expected {needed} bytes, got {size}; fetch it again")
    return entries


def read_bytes(store: Store, file: str, start: int, length: int) -> bytes:
    """Read some bytes of a file.

    Args:
        store: Where the file is.
        file: Name of the file.
        start: Offset of the first byte.
        length: Number of bytes.

    Raises:
        CheckpointError: The file is missing, ends too early or cannot be read.
    """
    content = bytearray(length)
    store.fill([Range(file, start, memoryview(content))])
    return bytes(content)


def _parse_entry(store: Store, file: str, name: str, value: Mapping[str, Any], base: int) -> StoredTensor:
    dtype, (begin, end), shape = value["dtype"], value["data_offsets"], tuple(value["shape"])
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
        raise ValueError(f"{name}: sizes and offsets must be whole numbers from 0, got {shape} and {begin} to {end}")
    if dtype in _NOT_READ:
        raise UnsupportedError(
            f"{store}/{file}: tensor {name} has dtype {dtype}, which cannot be read; give the original checkpoint"
        )
    if dtype not in _TORCH_DTYPES:
        raise ValueError(f"{name}: dtype {dtype!r} is not known here")
    entry = StoredTensor(name, file, dtype, shape, base + begin)
    if entry.size_bytes != end - begin:
        raise ValueError(f"{name}: {dtype} {list(shape)} does not fit the bytes {begin} to {end}")
    return entry


def _require_contiguous(path: str, entries: Iterable[StoredTensor], start: int) -> int:
    """Return where the last tensor ends, if every tensor begins where the one before it ends, as the format demands."""
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start != start:
            kind = "overlaps the one before it" if entry.start < start else "leaves a hole before it"
            raise CheckpointError(f"{path}: its safetensors header is damaged: tensor {entry.name} {kind}")
        start = entry.stop
    return start
