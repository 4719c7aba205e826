"""Sharded safetensors checkpoints: checked from their headers, read as slices.

Opening a checkpoint reads headers only. Everything that can be wrong with the files is found there: a shard that is
missing or cut short, an index that disagrees with its shards or points outside the folder, a pickle.

The weights of a quantized source are decoded while they are read. Nobody else knows of it: entries have the dtype and
shape of what `read` returns, and the scales are hidden.
"""

import copy
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Self

import torch

from astro.errors import CheckpointError
from astro.storage.atomic import parse_json
from astro.storage.byte_store import FolderStore, Range, Store
from astro.storage.encoded_names import Encoded, find_encoded
from astro.storage.encoded_tensor import EncodedTensor, Slice
from astro.storage.other_kinds import what_it_is
from astro.storage.packed_shapes import read_packed_shapes
from astro.storage.shard_header import StoredTensor, TensorEntry, read_bytes, read_store_header
from astro.storage.slice_decoder import SliceDecoder
from astro.storage.source_quantization import read_quantization

__all__ = ["INDEX_NAME", "SINGLE_NAME", "Checkpoint", "require_finite"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MODELOPT_CONFIG = "hf_quant_config.json"
_SAMPLE_BYTES = 64
_PIECE_ELEMENTS = 1 << 22
_SLICE_ELEMENTS = 1 << 24
"""Elements of an encoded weight that are decoded at a time; their float32 values take 64 MiB."""
_BATCH_BYTES = 1 << 28
"""Bytes of encoded weights that are read at a time, so that they are not all in memory beside the decoded ones."""


class Checkpoint:
    """Safetensors shards and their index. It travels to workers, and takes along what it read from the headers.

    Attributes:
        store: Where the files are.
        stored: Every tensor as it is stored, by name, sorted by name.
        encoded: What of it is decoded while it is read.
        entries: Every tensor as `read` returns it, by name, sorted by name.
    """

    def __init__(self, store: Store, stored: Mapping[str, StoredTensor], encoded: Encoded = Encoded()) -> None:  # noqa: B008
        """Take tensors whose headers were read already; see `open` and `open_source`.

        Args:
            store: Where the files are.
            stored: Every tensor by name.
            encoded: What of it is decoded while it is read.
        """
        self.store, self._decoder = store, SliceDecoder(torch.device("cpu"))
        self.stored = dict(sorted(stored.items()))
        self.encoded = encoded
        entries: dict[str, TensorEntry] = {name: e for name, e in stored.items() if name not in encoded.hidden}
        entries |= {weight.name: weight for weight in encoded.weights}
        self.entries = dict(sorted(entries.items()))

    @classmethod
    def open(cls, source: Store | Path) -> "Checkpoint":
        """Read the index and every header, and check that they agree. Tensors are returned as they are stored.

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
        entries: dict[str, StoredTensor] = {}
        for file in files:
            for entry in read_store_header(store, sizes, file):
                if weight_map is None or weight_map.get(entry.name) == file:
                    entries[entry.name] = entry
        absent = sorted(set(weight_map or ()) - set(entries))
        if weight_map is not None and absent:
            raise CheckpointError(
                f"{store}/{INDEX_NAME}: names tensors that their shards do not hold ({len(absent)}), "
                f"the first is {absent[0]!r} in {weight_map[absent[0]]}; index and shards are of different versions, "
                "fetch the checkpoint again"
            )
        return cls(store, entries)

    @classmethod
    def open_source(cls, source: Store | Path) -> "Checkpoint":
        """Open a checkpoint, and decode its weights while they are read if its config.json says that it is quantized.

        Args:
            source: Where the files are.

        Raises:
            CheckpointError: Something would make a later read fail or lie, or the source is quantized in a way that is
                not decoded.
        """
        checkpoint = cls.open(source)
        store, sizes = checkpoint.store, checkpoint.store.sizes()
        configs = [_read_json(store, sizes, file) for file in ("config.json", _MODELOPT_CONFIG)]
        try:
            quantization = read_quantization(*configs)
            if quantization is None:
                return checkpoint
            packed_shapes = read_packed_shapes(store, checkpoint.stored)
            return cls(store, checkpoint.stored, find_encoded(checkpoint.stored, quantization, packed_shapes))
        except CheckpointError as error:
            raise CheckpointError(f"{store}/{error}") from error

    def decoding_on(self, device: torch.device) -> Self:
        """Return this checkpoint, but decoding on a device. It cannot travel to another process then.

        Args:
            device: Device that decodes what `read` returns on the CPU.
        """
        decoding = copy.copy(self)
        decoding._decoder = SliceDecoder(device)
        return decoding

    def place(self, name: str) -> str:
        """Return the path of the file that holds a tensor, for messages.

        Args:
            name: Name of the tensor.
        """
        return f"{self.store}/{self.entries[name].file}"

    def fingerprint(self) -> str:
        """Return a hash that tells this checkpoint from every other, as hexadecimal digits.

        It covers every name, dtype and shape, and the store's revision. Where the store has no revision, it covers
        configs, code and some bytes of every tensor instead. That does not read the weights: 64 bytes from the middle
        of each tensor, scales among them, tell one state of a folder from another.
        """
        digest = hashlib.sha256((self.store.revision or "").encode())
        if self.store.revision is None:
            sizes = self.store.sizes()
            more = sorted(file for file in sizes if file.endswith(".py") or file == _MODELOPT_CONFIG)
            for file in ("config.json", *more):
                digest.update(file.encode() + (read_bytes(self.store, file, 0, sizes[file]) if file in sizes else b""))
        for entry in self.stored.values():
            digest.update(f"{entry.name}|{entry.dtype}|{entry.shape}|".encode())
            if self.store.revision is None:
                length = min(_SAMPLE_BYTES, entry.size_bytes)
                middle = entry.start + (entry.size_bytes - length) // 2
                digest.update(read_bytes(self.store, entry.file, middle, length))
        return digest.hexdigest()

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read some tensors onto the CPU, into memory of their own: as they are stored, or decoded.

        Args:
            names: Names of the tensors.

        Raises:
            CheckpointError: A shard cannot be read any more.
        """
        entries = [self.entries[name] for name in names]
        stored = [entry for entry in entries if isinstance(entry, StoredTensor)]
        plain = {e.name: e.to_read() for e in sorted(stored, key=lambda entry: (entry.file, entry.start))}
        self.store.fill([span for _, span in plain.values()])
        tensors = {name: tensor for name, (tensor, _) in plain.items()}
        encoded = [entry for entry in entries if isinstance(entry, EncodedTensor)]
        for entry, part in self._filled(sorted(encoded, key=lambda e: (e.file, e.sources[0].start)), _SLICE_ELEMENTS):
            if entry.name not in tensors:
                tensors[entry.name] = torch.empty(entry.shape, dtype=entry.torch_dtype)
            tensors[entry.name][part.first : part.last] = self._decoder.decode(entry, part)
        return tensors

    def pieces(self, name: str, num_elements: int) -> Iterator[torch.Tensor]:
        """Yield the values of a float tensor in order; each piece is valid until the next is asked for.

        Args:
            name: Name of the tensor.
            num_elements: Number of values in a piece; the last piece may be shorter, and those of an encoded weight
                longer.
        """
        entry = self.entries[name]
        if isinstance(entry, EncodedTensor):
            yield from (entry.decode(part).flatten() for _, part in self._filled([entry], num_elements))
            return
        dtype = entry.float_dtype or torch.float32
        buffer = torch.empty(min(num_elements, entry.size_bytes // dtype.itemsize), dtype=dtype)
        for offset in range(0, entry.size_bytes, num_elements * dtype.itemsize):
            part = buffer[: (entry.size_bytes - offset) // dtype.itemsize]
            start = self.stored[name].start + offset
            self.store.fill([Range(entry.file, start, part.view(torch.uint8).numpy().data)])
            yield part

    def size_bytes(self, names: Iterable[str]) -> int:
        """Return the number of bytes that reading some tensors moves.

        Args:
            names: Names of the tensors.
        """
        entries = (self.entries[name] for name in names)
        sources = (entry.sources if isinstance(entry, EncodedTensor) else (entry,) for entry in entries)
        return sum(source.size_bytes for source in itertools.chain.from_iterable(sources))

    def held_bytes(self, names: Iterable[str]) -> int:
        """Return the size of some tensors once they are read, in bytes.

        Args:
            names: Names of the tensors.
        """
        return sum(self.entries[name].size_bytes for name in names)

    def _filled(self, entries: Iterable[EncodedTensor], num_elements: int) -> Iterator[tuple[EncodedTensor, Slice]]:
        """Read slices of encoded weights, as many at a time as are worth their requests, and yield them in order."""
        batch: list[tuple[EncodedTensor, Slice]] = []
        size = 0
        for entry in entries:
            for part in entry.slices(num_elements):
                batch.append((entry, part))
                size += sum(len(span.view) for span in part.ranges)
                if size >= _BATCH_BYTES:
                    self._fill(batch)
                    yield from batch
                    batch, size = [], 0
        self._fill(batch)
        yield from batch

    def _fill(self, batch: Iterable[tuple[EncodedTensor, Slice]]) -> None:
        self.store.fill([span for _, part in batch for span in part.ranges])


def require_finite(
    checkpoint: Checkpoint, unused: Collection[str] = (), watch: Callable[[int], None] | None = None
) -> list[str]:
    """Read every float tensor once, a piece at a time, and refuse NaN and Inf.

    Args:
        checkpoint: The checkpoint that is read.
        unused: Names of the tensors that the model does not read. A mask that is stored among them may hold -Inf.
        watch: Function that gets the size in bytes of each tensor that is checked; None where nobody waits.

    Returns:
        Names of the unused tensors that are not finite.

    Raises:
        CheckpointError: A tensor that the model reads is not finite; the message names the first.
    """
    others = []
    for name, entry in checkpoint.entries.items():
        if entry.float_dtype is not None and not _is_finite(checkpoint, name):
            if name not in unused:
                raise CheckpointError(
                    f"{checkpoint.place(name)}: tensor {name} holds NaN or Inf; "
                    "the checkpoint is damaged or diverged in training, and quantizing it cannot work"
                )
            others.append(name)
        if watch is not None:
            watch(entry.size_bytes)
    return others


def _is_finite(checkpoint: Checkpoint, name: str) -> bool:
    return all(bool(torch.isfinite(piece).all()) for piece in checkpoint.pieces(name, _PIECE_ELEMENTS))


def _read_json(store: Store, sizes: Mapping[str, int], file: str) -> dict[str, Any]:
    return parse_json(read_bytes(store, file, 0, sizes[file]), f"{store}/{file}") if file in sizes else {}


def _read_weight_map(store: Store, sizes: Mapping[str, int]) -> dict[str, str] | None:
    if INDEX_NAME not in sizes or SINGLE_NAME in sizes:  # transformers does not look at the index then
        return None
    path = f"{store}/{INDEX_NAME}"
    weight_map = parse_json(read_bytes(store, INDEX_NAME, 0, sizes[INDEX_NAME]), path).get("weight_map")
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
