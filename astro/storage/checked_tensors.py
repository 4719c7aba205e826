"""Files that workers hand to each other: safetensors with a checksum, so that no damage passes into the result."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from astro.errors import CheckpointError, DamagedError
from astro.storage.atomic import load_tensors, read_note, save_tensors

if TYPE_CHECKING:
    import torch

__all__ = ["load_part", "read_part_note", "save_part"]

_CHECKSUM = "crc32 {:08x} {:08x}\n"
"""The first line of the note: the CRC of everything, and the CRC of the note alone."""
_PAGE = 4096
"""Bytes that are added up, as words of 8 bytes, before the checksum is taken over the sums."""


def save_part(path: Path, tensors: "Mapping[str, torch.Tensor]", note: str = "") -> None:
    """Write tensors, a note and a checksum of both atomically.

    Args:
        path: Where the file belongs.
        tensors: Tensors by name, on any device.
        note: Text that is kept beside the tensors.

    Raises:
        StorageError: The file system refused.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(path, ready, _checksum(ready, note) + note)


def load_part(path: Path) -> "tuple[dict[str, torch.Tensor], str]":
    """Read every tensor into memory of its own, and the note.

    Args:
        path: A file that `save_part` wrote.

    Returns:
        Tensors by name, and the note.

    Raises:
        DamagedError: The file is missing, cut short, or differs from what was written.
    """
    try:
        tensors, text = load_tensors(path)
    except CheckpointError as error:
        raise DamagedError(path, _reason(path, error)) from error
    expected, _, note = text.partition("\n")
    checksum = _checksum(tensors, note)
    if f"{expected}\n" != checksum:
        raise DamagedError(path, f"its checksum is wrong: expected {expected!r}, got {checksum.strip()!r}")
    return tensors, note


def read_part_note(path: Path) -> str:
    """Read the note alone, but no tensor.

    Args:
        path: A file that `save_part` wrote.

    Raises:
        DamagedError: The file is missing, or the note differs from what was written.
    """
    try:
        expected, _, note = read_note(path).partition("\n")
    except CheckpointError as error:
        raise DamagedError(path, _reason(path, error)) from error
    actual = f"{zlib.crc32(note.encode()):08x}"
    if expected.split(" ")[-1] != actual:
        raise DamagedError(path, f"the checksum of its note is wrong: expected {expected!r}, got {actual}")
    return note


def _reason(path: Path, error: CheckpointError) -> str:
    return str(error).removeprefix(f"{path}: ")


def _checksum(tensors: "Mapping[str, torch.Tensor]", note: str) -> str:
    """Return the checksum line of a note and of the names, dtypes, shapes and values of tensors."""
    value = zlib.crc32(note.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode(), value)
        for part in _folded(tensor):
            value = zlib.crc32(part.numpy().data, value)
    return _CHECKSUM.format(value, zlib.crc32(note.encode()))


def _folded(tensor: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """Return the sum of every page of a tensor's bytes, and the bytes behind the last whole page.

    A sum goes as fast as memory is read, a CRC at a tenth of that, slower than the network brings the bytes. Words of
    one page that changed places would not be noticed; pages that did are, and so is a word that changed.
    """
    import torch

    flat = tensor.reshape(-1).view(torch.uint8)
    flat = flat.clone() if flat.storage_offset() % 8 else flat  # words of 8 bytes have to be aligned
    whole = flat.numel() - flat.numel() % _PAGE
    return flat[:whole].view(torch.int64).view(-1, _PAGE // 8).sum(-1), flat[whole:]
