"""Which files beside the weights belong to a model: all but those that this list leaves out."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from astro.storage.atomic import PARTIAL_SUFFIX

__all__ = ["RUN_FILE", "large_files", "list_folder", "side_files"]

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot",
    ".npz", ".npy", ".tflite", ".mlmodel", ".engine", ".pkl", ".pickle", ".distcp", ".index.json",
)  # fmt: skip
"""Endings of files with weights, in whatever form, and of their indexes."""
_RECORDS = (".parquet", ".arrow", ".log")
"""Endings of files with data and with what was printed while a model was trained."""
_EVENTS = "events.out.tfevents."
"""Beginning of the names of TensorBoard's files, which tell the host's name."""
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".pdf", ".mp4", ".webm")
"""Endings of files that a card shows; the result has a card of its own."""
_NAMES = (
    "README.md", "config.json", "adapter_config.json", "hf_quant_config.json", "quantize_config.json",
    "quant_config.json", "trainer_state.json", "smoothing.json",
)  # fmt: skip
"""Files that the run writes itself, or that say of the source what is not true of the result."""
RUN_FILE = "run.json"
"""File that makes a folder the directory of a run of this project."""
_MAX_BYTES = 256_000_000
"""Size above which a file is taken for weights or data."""


def side_files(sizes: Mapping[str, int]) -> list[str]:
    """Choose the files of a model that are copied beside its weights, sorted.

    A folder within the model that holds weights is another model, or another form of this one: nothing of it belongs
    here. Hidden files and folders are those of git and of downloads.

    Args:
        sizes: Size in bytes of every file of the model by its path, with `/` between folders.
    """
    return [name for name in _chosen(sizes) if sizes[name] <= _MAX_BYTES]


def large_files(sizes: Mapping[str, int]) -> list[str]:
    """Return the files that `side_files` leaves out for their size alone, sorted.

    Args:
        sizes: Size in bytes of every file of the model by its path, with `/` between folders.
    """
    return [name for name in _chosen(sizes) if sizes[name] > _MAX_BYTES]


def list_folder(folder: Path, without: Iterable[Path] = ()) -> dict[str, int]:
    """List a folder and the folders in it, without those that are links: the size in bytes of every file by its path.

    Args:
        folder: Folder to list.
        without: Folders in it that are not entered.
    """
    avoided = {path.resolve() for path in without}
    sizes: dict[str, int] = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(place, name).resolve() not in avoided and name[0] != "."]
        paths = [Path(place, file) for file in files]
        sizes |= {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths if path.is_file()}
    return sizes


def _chosen(sizes: Mapping[str, int]) -> list[str]:
    others = {_top(name) for name in sizes if "/" in name and (_is_weights(name) or name.endswith(f"/{RUN_FILE}"))}
    return [name for name in sorted(sizes) if _belongs(name) and _top(name) not in others]


def _belongs(name: str) -> bool:
    path = PurePosixPath(name)
    is_safe = not path.is_absolute() and "\\" not in name and not any(part[0] == "." for part in path.parts)
    return (
        is_safe
        and "__pycache__" not in path.parts
        and path.name not in _NAMES
        and not _is_weights(name)
        and not path.name.startswith(_EVENTS)
        and not name.lower().endswith((*_PICTURES, *_RECORDS, PARTIAL_SUFFIX))
    )


def _is_weights(name: str) -> bool:
    return name.lower().endswith(_WEIGHTS)


def _top(name: str) -> str:
    """Return the outermost folder of a path; empty for a file that is in none."""
    return name.partition("/")[0] if "/" in name else ""
