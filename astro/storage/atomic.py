"""Whole files, JSON and safetensors: read in one go, and written beside their place and renamed when they are whole."""

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from astro.errors import CheckpointError, StorageError

if TYPE_CHECKING:  # torch takes seconds to load, and a command that only reads JSON need not wait for it
    import torch

__all__ = [
    "PARTIAL_SUFFIX",
    "load_tensors",
    "parse_json",
    "read_json",
    "read_note",
    "save_tensors",
    "sha256_of",
    "write_atomic",
    "write_bytes",
    "write_json",
    "write_text",
]

PARTIAL_SUFFIX = ".part"
"""Ending of files that are being written; a file with it that no process writes any more can be deleted."""


def read_json(path: Path, if_missing: str = "") -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: The file.
        if_missing: What the message adds when there is no such file: who needs it, or what to do.

    Raises:
        CheckpointError: The file is missing, is no JSON, or holds no object.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not found" + (f"; {if_missing}" if if_missing else "")) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    return parse_json(raw, str(path))


def parse_json(raw: bytes, place: str) -> dict[str, Any]:
    """Read a JSON object from bytes.

    Args:
        raw: Text in UTF-8.
        place: Where the bytes come from, for messages.

    Raises:
        CheckpointError: The bytes are no JSON, or hold no object.
    """
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{place}: expected a JSON object, got {type(content).__name__}")
    return content


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Fill a file beside its place, sync it to disk and rename it into place.

    Whoever may read the user's files may read it, also where the writer is a library that lets the owner alone.

    Args:
        path: Where the file belongs; folders above it are made.
        write: Writes the content to the path that it is called with.

    Raises:
        StorageError: The file system refused, e.g. because it is full. `path` is then as it was.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # the first refusal is what the caller has to know; a partial file does no harm
            partial.unlink()
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        advice = "the disk is full: free space and run the same command again" if full else "check the folder"
        raise StorageError(f"{path}: cannot be written: {error}; {advice}. What is finished is kept") from error


def write_bytes(path: Path, content: bytes | bytearray) -> None:
    """Write a file atomically.

    Args:
        path: Where the file belongs.
        content: The file's bytes.
    """

    def write(partial: Path) -> None:
        partial.write_bytes(content)

    write_atomic(path, write)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8.

    Args:
        path: Where the file belongs.
        text: The file's text.
    """
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, indented.

    Args:
        path: Where the file belongs.
        content: The object.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def save_tensors(path: Path, tensors: "Mapping[str, torch.Tensor]", note: str | None = None) -> None:
    """Write a safetensors file atomically. Its bytes depend on names, values and the note alone.

    Args:
        path: Where the file belongs.
        tensors: Tensors by name, on any device.
        note: Text that the header holds in place of the entry `format`. The header never holds both, because the
            library writes several entries in any order.
    """
    from safetensors.torch import save_file

    metadata = {"format": "pt"} if note is None else {"note": note}
    ready = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    write_atomic(path, lambda partial: save_file(ready, partial, metadata=metadata))


def load_tensors(path: Path) -> "tuple[dict[str, torch.Tensor], str]":
    """Read every tensor of a safetensors file into memory of its own, and the header's note.

    Args:
        path: The file.

    Returns:
        Tensors by name, and the note; it is empty where the header has none.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    with _opened(path) as handle:
        tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
        return tensors, _note_of(handle)


def read_note(path: Path) -> str:
    """Read the note in a safetensors file's header, but no tensor. The note is empty where the header has none.

    Args:
        path: The file.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    with _opened(path) as handle:
        return _note_of(handle)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            yield handle
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _note_of(handle: Any) -> str:
    note: str = (handle.metadata() or {}).get("note", "")
    return note


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits.

    Args:
        path: The file.
    """
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
