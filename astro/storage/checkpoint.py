"""Sharded safetensors checkpoints: checked from their headers, read as slices.

Opening a checkpoint reads headers only. Everything that can be wrong with the files is found there: a shard that is
missing or cut short, an index that disagrees with its shards or points outside the folder, a pickle.
"""

import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from astro.errors import CheckpointError
from astro.storage.atomic import parse_json
from astro.storage.byte_store import FolderStore, Range, Store
from astro.storage.other_kinds import LFS_POINTER, what_it_is

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "Checkpoint",
    "TensorEntry",
    "read_header",
    "require_finite",
]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000
_HEAD_BYTES = 1 << 18
_SAMPLE_BYTES = 64
_PIECE_ELEMENTS = 1 << 22

_TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies and what it is.

    Attributes:
        name: Name of the tensor in the checkpoint.
        file: Name of the shard that holds it.
        dtype: Dtype as safetensors writes it, e.g. "BF16".
        shape: Sizes of the tensor.
        start: Offset of its first byte in the file.
        stop: Offset behind its last byte in the file.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.stop - self.start

    @property
    def float_dtype(self) -> torch.dtype | None:
        """Dtype of the tensor in torch; None where the tensor is no plain float."""
        return _TORCH_DTYPES[self.dtype] if self.dtype in _FLOATS else None


class Checkpoint:
    """Safetensors shards and their index. It travels to workers, and takes along what it read from the headers.

    Attributes:
        store: Where the files are.
        entries: Every tensor by name, sorted by name.
    """

    def __init__(self, store: Store, entries: Mapping[str, TensorEntry]) -> None:
        """Take tensors whose headers were read already; see `open`.

        Args:
            store: Where the files are.
            entries: Every tensor by name.
        """
        self.store = store
        self.entries = dict(sorted(entries.items()))

    @classmethod
    def open(cls, source: Store | Path) -> "Checkpoint":
        """Read the index and every header, and check that they agree.

        Args:
            source: Where the files are.

        Raises:
            CheckpointError: Something would make a later read fail or lie.
        """
        store = FolderStore(source) if isinstance(source, Path) else source
        sizes = store.sizes()
        if INDEX_NAME not in sizes and SINGLE_NAME not in sizes:
            raise CheckpointError(what_it_is(store, sizes))
        weight_map = _read_weight_map(store, sizes)
        files = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_NAME]
        entries: dict[str, TensorEntry] = {}
        for file in files:
            for entry in _read_header(store, sizes, file):
                if weight_map is None or weight_map.get(entry.name) == file:
                    entries[entry.name] = entry
        absent = sorted(set(weight_map or ()) - set(entries))
        if weight_map is not None and absent:
            raise CheckpointError(
                f"{store}/{INDEX_NAME}: names {len(absent)} tensor(s) that their shards do not hold, "
                f"the first is {absent[0]!r} in {weight_map[absent[0]]}; index and shards are of different versions, "
                "fetch the checkpoint again"
            )
        return cls(store, entries)

    def place(self, name: str) -> str:
        """Return the path of the file that holds a tensor, for messages.

        Args:
            name: Name of the tensor.
        """
        return f"{self.store}/{self.entries[name].file}"

    def fingerprint(self) -> str:
        """Return a hash that tells this checkpoint from every other, as hexadecimal digits.

        It covers every name, dtype and shape, and the store's revision. Where the store has no revision, it covers
        config, code and some bytes of every tensor instead. That does not read the weights: 64 bytes from the middle
        of each tensor tell one state of a folder from another.
        """
        digest = hashlib.sha256((self.store.revision or "").encode())
        if self.store.revision is None:
            sizes = self.store.sizes()
            for file in ("config.json", *sorted(file for file in sizes if file.endswith(".py"))):
                digest.update(file.encode() + (_read_bytes(self.store, file, 0, sizes[file]) if file in sizes else b""))
        for entry in self.entries.values():
            digest.update(f"{entry.name}|{entry.dtype}|{entry.shape}|".encode())
            if self.store.revision is None:
                length = min(_SAMPLE_BYTES, entry.size_bytes)
                middle = entry.start + (entry.size_bytes - length) // 2
                digest.update(_read_bytes(self.store, entry.file, middle, length))
        return digest.hexdigest()

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read some tensors as they are stored, onto the CPU, into memory of their own.

        Args:
            names: Names of the tensors.

        Raises:
            CheckpointError: A shard cannot be read any more.
        """
        tensors, ranges = {}, []
        for entry in sorted((self.entries[name] for name in names), key=lambda entry: (entry.file, entry.start)):
            dtype = _TORCH_DTYPES[entry.dtype]
            flat = torch.empty(entry.size_bytes // dtype.itemsize, dtype=dtype)
            ranges.append(Range(entry.file, entry.start, flat.view(torch.uint8).numpy().data))
            tensors[entry.name] = flat.reshape(entry.shape)
        self.store.fill(ranges)
        return tensors

    def pieces(self, name: str, num_elements: int) -> Iterator[torch.Tensor]:
        """Yield the values of a float tensor in order; each piece is valid until the next is asked for.

        Args:
            name: Name of the tensor.
            num_elements: Number of values in a piece; the last piece may be shorter.
        """
        entry = self.entries[name]
        dtype = entry.float_dtype or torch.float32
        buffer = torch.empty(min(num_elements, entry.size_bytes // dtype.itemsize), dtype=dtype)
        for offset in range(0, entry.size_bytes, num_elements * dtype.itemsize):
            part = buffer[: (entry.size_bytes - offset) // dtype.itemsize]
            self.store.fill([Range(entry.file, entry.start + offset, part.view(torch.uint8).numpy().data)])
            yield part

    def size_bytes(self, names: Iterable[str]) -> int:
        """Return the number of bytes that reading some tensors moves.

        Args:
            names: Names of the tensors.
        """
        return sum(self.entries[name].size_bytes for name in names)


def require_finite(checkpoint: Checkpoint, unused: Collection[str] = ()) -> list[str]:
    """Read every float tensor once, a piece at a time, and refuse NaN and Inf.

    Args:
        checkpoint: The checkpoint that is read.
        unused: Names of the tensors that the model does not read. A mask that is stored among them may hold -Inf.

    Returns:
        Names of the unused tensors that are not finite.

    Raises:
        CheckpointError: A tensor that the model reads is not finite; the message names the first.
    """
    others = []
    for name, entry in checkpoint.entries.items():
        if entry.float_dtype is None:
            continue
        if all(bool(torch.isfinite(piece).all()) for piece in checkpoint.pieces(name, _PIECE_ELEMENTS)):
            continue
        if name not in unused:
            raise CheckpointError(
                f"{checkpoint.place(name)}: tensor {name} holds NaN or Inf; "
                "the checkpoint is damaged or diverged in training, and quantizing it cannot work"
            )
        others.append(name)
    return others


def _read_bytes(store: Store, file: str, start: int, length: int) -> bytes:
    content = bytearray(length)
    store.fill([Range(file, start, memoryview(content))])
    return bytes(content)


def _read_weight_map(store: Store, sizes: Mapping[str, int]) -> dict[str, str] | None:
    if INDEX_NAME not in sizes or SINGLE_NAME in sizes:  # transformers does not look at the index then
        return None
    path = f"{store}/{INDEX_NAME}"
    weight_map = parse_json(_read_bytes(store, INDEX_NAME, 0, sizes[INDEX_NAME]), path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected an object 'weight_map' that names tensors, got {weight_map!r:.80}")
    for name, file in weight_map.items():
        # Only the text counts: a hub cache stores shards as links that do leave the folder.
        inside = isinstance(file, str) and len(PurePosixPath(file).parts) == 1 and file not in ("", "..", ".")
        if not inside or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {name!r} is said to be in {file!r}; expected the name of a .safetensors file in the "
                "same folder. A path that leaves the folder is never followed"
            )
    return weight_map


def read_header(folder: Path, file: str) -> list[TensorEntry]:
    """Read which tensors a shard in a folder holds, from its header; the file's length must agree with it.

    Args:
        folder: The folder.
        file: Name of the shard in it.

    Raises:
        CheckpointError: The shard is missing, cut short or damaged.
    """
    store = FolderStore(folder)
    return _read_header(store, store.sizes(), file)


def _read_header(store: Store, sizes: Mapping[str, int], file: str) -> list[TensorEntry]:
    path, size = f"{store}/{file}", sizes.get(file)
    if size is None:
        raise CheckpointError(f"{path}: the index names this shard, but it is missing; fetch it again")
    # A short header is read in one piece with its length: every request to a remote store takes its time.
    head = _read_bytes(store, file, 0, min(size, _HEAD_BYTES))
    if head.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{path}: is a pointer of git-lfs, not the shard; run `git lfs pull` in the folder, or fetch it with "
            "`hf download`"
        )
    length = struct.unpack("<Q", head[:8])[0] if size >= 8 else _MAX_HEADER_BYTES + 1
    if length > min(_MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{path}: no safetensors file, or cut short: {size} bytes, its header asks for more")
    missing = 8 + length - len(head)
    raw = (head + _read_bytes(store, file, len(head), missing) if missing > 0 else head)[8 : 8 + length]
    try:
        header = json.loads(raw)
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        entries = [_parse_entry(name, file, value, 8 + length) for name, value in tensors.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its safetensors header is damaged: {error!r:.200}; fetch it again") from error
    needed = _require_contiguous(path, entries, 8 + length)
    if size != needed:
        kind = "cut short" if size < needed else "longer than its header says"
        raise CheckpointError(f"{path}: the shard is {kind}: expected {needed} bytes, got {size}; fetch it again")
    return entries


def _parse_entry(name: str, file: str, value: Mapping[str, Any], base: int) -> TensorEntry:
    dtype, (begin, end), shape = value["dtype"], value["data_offsets"], tuple(value["shape"])
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
        raise ValueError(f"{name}: sizes and offsets must be whole numbers from 0, got {shape} and {begin} to {end}")
    if dtype not in _TORCH_DTYPES:
        raise ValueError(f"{name}: dtype {dtype!r} is not known here")
    if math.prod(shape) * _TORCH_DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{name}: {dtype} {list(shape)} does not fit the bytes {begin} to {end}")
    return TensorEntry(name, file, dtype, shape, base + begin, base + end)


def _require_contiguous(path: str, entries: Iterable[TensorEntry], start: int) -> int:
    """Return where the last tensor ends, if every tensor begins where the one before it ends, as the format demands."""
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start != start:
            kind = "overlaps the one before it" if entry.start < start else "leaves a hole before it"
            raise CheckpointError(f"{path}: its safetensors header is damaged: tensor {entry.name} {kind}")
        start = entry.stop
    return start
