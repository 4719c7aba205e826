"""Sharded safetensors checkpoints: checked from their headers, read as slices.

Opening a checkpoint reads headers only. Everything that can be wrong with the files is found there: a shard that is
missing or cut short, an index that disagrees with its shards or points outside the folder, a pickle.
"""

import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from astro.errors import CheckpointError
from astro.files import read_json

__all__ = [
    "INDEX_NAME",
    "Checkpoint",
    "TensorEntry",
    "read_header",
    "require_finite",
]

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_HEADER_BYTES = 100_000_000
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
        name: in the checkpoint.
        file: shard's name inside the folder.
        dtype: as safetensors writes it, e.g. "BF16".
        shape: sizes.
        start: first byte in the file.
        stop: one past the last byte in the file.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.stop - self.start

    @property
    def float_dtype(self) -> torch.dtype | None:
        """The torch dtype, or None where the tensor is no plain float."""
        return _TORCH_DTYPES[self.dtype] if self.dtype in _FLOATS else None


class Checkpoint:
    """A folder of safetensors shards.

    Attributes:
        folder: where the files are.
        entries: every tensor by name, sorted by name.
    """

    def __init__(self, folder: Path, entries: Mapping[str, TensorEntry]) -> None:
        self.folder = folder
        self.entries = dict(sorted(entries.items()))

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the index and every header, and check that they agree.

        Raises:
            CheckpointError: anything that would make a later read fail or lie.
        """
        _refuse_other_kinds(folder)
        weight_map = _read_weight_map(folder)
        files = sorted(set(weight_map.values())) if weight_map is not None else [_SINGLE_NAME]
        entries: dict[str, TensorEntry] = {}
        for file in files:
            for entry in read_header(folder, file):
                if weight_map is None or weight_map.get(entry.name) == file:
                    entries[entry.name] = entry
        absent = sorted(set(weight_map or ()) - set(entries))
        if weight_map is not None and absent:
            raise CheckpointError(
                f"{folder / INDEX_NAME}: names {len(absent)} tensor(s) that their shards do not hold, "
                f"the first is {absent[0]!r} in {weight_map[absent[0]]}; index and shards are of different versions, "
                "fetch the checkpoint again"
            )
        return cls(folder, entries)

    def fingerprint(self) -> str:
        """A hash of config, code, every name, dtype and shape, and of some bytes of every tensor, hex.

        It does not read the weights: 64 bytes from the middle of each tensor tell one revision from another.
        """
        digest = hashlib.sha256()
        for path in (self.folder / "config.json", *sorted(self.folder.glob("*.py"))):
            digest.update(path.name.encode() + (path.read_bytes() if path.is_file() else b""))
        for entry in self.entries.values():
            length = min(_SAMPLE_BYTES, entry.size_bytes)
            sample = torch.empty(length, dtype=torch.uint8)
            self._read_into(entry, (entry.size_bytes - length) // 2, sample)
            digest.update(f"{entry.name}|{entry.dtype}|{entry.shape}|".encode() + sample.numpy().tobytes())
        return digest.hexdigest()

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Some tensors as they are stored, on the CPU, in memory of their own.

        Nothing is mapped: a mapped file that is cut short while it is read ends the process instead of the call.

        Raises:
            CheckpointError: a shard cannot be read any more.
        """
        found = {}
        for entry in sorted((self.entries[name] for name in names), key=lambda entry: (entry.file, entry.start)):
            dtype = _TORCH_DTYPES[entry.dtype]
            flat = torch.empty(entry.size_bytes // dtype.itemsize, dtype=dtype)
            self._read_into(entry, 0, flat)
            found[entry.name] = flat.reshape(entry.shape)
        return found

    def pieces(self, name: str, num_elements: int) -> Iterator[torch.Tensor]:
        """The values of one float tensor in order, at most `num_elements` at a time, each valid until the next."""
        entry = self.entries[name]
        dtype = entry.float_dtype or torch.float32
        buffer = torch.empty(min(num_elements, entry.size_bytes // dtype.itemsize), dtype=dtype)
        for offset in range(0, entry.size_bytes, num_elements * dtype.itemsize):
            part = buffer[: (entry.size_bytes - offset) // dtype.itemsize]
            self._read_into(entry, offset, part)
            yield part

    def _read_into(self, entry: TensorEntry, offset: int, flat: torch.Tensor) -> None:
        path = self.folder / entry.file
        view = flat.view(torch.uint8).numpy().data
        try:
            with path.open("rb", buffering=0) as handle:
                handle.seek(entry.start + offset)
                while view:
                    count = handle.readinto(view)
                    if not count:
                        raise CheckpointError(
                            f"{path}: ends inside tensor {entry.name}; it was cut short, fetch it again"
                        )
                    view = view[count:]
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read {entry.name}: {error}") from error

    def size_bytes(self, names: Iterable[str]) -> int:
        """Bytes that reading some tensors moves."""
        return sum(self.entries[name].size_bytes for name in names)


def require_finite(checkpoint: Checkpoint) -> None:
    """Read every float tensor once, a piece at a time, and refuse NaN and Inf.

    Raises:
        CheckpointError: naming the first tensor that is not finite.
    """
    for name, entry in checkpoint.entries.items():
        if entry.float_dtype is None:
            continue
        if not all(bool(torch.isfinite(piece).all()) for piece in checkpoint.pieces(name, _PIECE_ELEMENTS)):
            raise CheckpointError(
                f"{checkpoint.folder / entry.file}: tensor {name} holds NaN or Inf; "
                "the checkpoint is damaged or diverged in training, and quantizing it cannot work"
            )


def _refuse_other_kinds(folder: Path) -> None:
    if folder.suffix == ".gguf" or (folder.is_dir() and any(folder.glob("*.gguf")) and not _has_weights(folder)):
        raise CheckpointError(
            f"{folder}: a GGUF file holds weights that are quantized already; quantizing them again adds their error "
            "to ours. Give the original safetensors checkpoint of the model"
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; model.source is a local or shared folder with config.json and *.safetensors "
            "(fetch one with `hf download ORG/NAME --local-dir FOLDER`)"
        )
    if _has_weights(folder):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: holds {pickles[0]} but no safetensors; such a file is a pickle, which runs code when it is "
            "loaded, and is not read. Convert it (transformers: save_pretrained) or fetch the safetensors revision"
        )
    raise CheckpointError(f"{folder}: holds neither {INDEX_NAME} nor {_SINGLE_NAME}")


def _has_weights(folder: Path) -> bool:
    return (folder / INDEX_NAME).is_file() or (folder / _SINGLE_NAME).is_file()


def _read_weight_map(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX_NAME
    if not path.is_file():
        return None
    weight_map = read_json(path).get("weight_map")
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
    """The tensors that a shard holds, by its header; the file's length must agree.

    Raises:
        CheckpointError: the shard is missing, cut short or damaged.
    """
    path = folder / file
    if not path.is_file():
        raise CheckpointError(f"{path}: the index names this shard, but it is missing; fetch it again")
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            head = handle.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else _MAX_HEADER_BYTES + 1
            raw = handle.read(length) if length <= min(_MAX_HEADER_BYTES, size - 8) else None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if raw is None:
        raise CheckpointError(f"{path}: no safetensors file, or cut short: {size} bytes, its header asks for more")
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


def _require_contiguous(path: Path, entries: Iterable[TensorEntry], start: int) -> int:
    """End of the last tensor, if every tensor begins where the one before it ends, as the format demands."""
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start != start:
            kind = "overlaps the one before it" if entry.start < start else "leaves a hole before it"
            raise CheckpointError(f"{path}: its safetensors header is damaged: tensor {entry.name} {kind}")
        start = entry.stop
    return start
