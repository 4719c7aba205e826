"""The file beside a model that says how its inputs are smoothed: what was multiplied and divided, and by what.

Servers need nothing of it, because the factors are in the weights. It serves to compare the model with its source.
"""

from collections.abc import Iterable
from pathlib import Path

from astro.errors import CheckpointError
from astro.model.smoothed_tensors import SmoothedInput
from astro.storage.atomic import read_json, write_json

__all__ = ["SMOOTHING_NAME", "needs_adapter", "read_smoothing", "write_smoothing"]

SMOOTHING_NAME = "smoothing.json"
"""Name of the file, in the folder of the model."""


def write_smoothing(folder: Path, inputs: Iterable[SmoothedInput], is_held: bool) -> None:
    """Write the file.

    Args:
        folder: Folder of the model.
        inputs: The inputs of all blocks, smoothed or not.
        is_held: Whether the model's adapter alone holds the weights of channels that are smoothed.
    """
    content = {"held_by_adapter": is_held, "inputs": [smoothed.to_json() for smoothed in inputs]}
    write_json(folder / SMOOTHING_NAME, content)


def needs_adapter(folder: Path) -> bool:
    """Tell whether a model's adapter alone holds the weights of channels that are smoothed.

    Args:
        folder: Folder with the model's files that are no weights.
    """
    path = folder / SMOOTHING_NAME
    return path.is_file() and bool(read_json(path).get("held_by_adapter"))


def read_smoothing(folder: Path) -> list[SmoothedInput]:
    """Read the file of a model; empty where there is none, because nothing is smoothed.

    Args:
        folder: Folder with the model's files that are no weights.

    Raises:
        CheckpointError: The file is not as it was written.
    """
    path = folder / SMOOTHING_NAME
    if not path.is_file():
        return []
    try:
        return [SmoothedInput.from_json(content) for content in read_json(path)["inputs"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is incomplete: {error!r}; copy the model anew") from error
