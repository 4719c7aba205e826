"""Files that workers hand each other: safetensors with a checksum, so that no damage goes on into the result."""

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from astro.checkpoint import load_tensors, read_note, save_tensors
from astro.errors import CheckpointError, DamagedError

__all__ = ["load_part", "read_part_note", "save_part"]

_CHECKSUM = "crc32 {:08x}\n"


def save_part(path: Path, tensors: Mapping[str, torch.Tensor], note: str = "") -> None:
    """Write tensors, a note and a checksum of the tensors atomically.

    Raises:
        StorageError: the file system refused.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(path, ready, _checksum(ready) + note)


def load_part(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Every tensor in memory of its own, and the note.

    Raises:
        DamagedError: the file is missing, cut short, or differs from what was written.
    """
    try:
        tensors, text = load_tensors(path)
    except CheckpointError as error:
        raise DamagedError(path, f"part of the run: {error}") from error
    checksum = _checksum(tensors)
    if not text.startswith(checksum):
        raise DamagedError(path, f"its checksum is wrong: expected {text[:14]!r}, got {checksum.strip()!r}")
    return tensors, text.removeprefix(checksum)


def read_part_note(path: Path) -> str:
    """The note alone, the tensors unread.

    Raises:
        DamagedError: the file is missing or damaged.
    """
    try:
        return read_note(path).partition("\n")[2]
    except CheckpointError as error:
        raise DamagedError(path, f"part of the run: {error}") from error


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return _CHECKSUM.format(value)
