"""What the name of a model says of its place: a folder, a repository of the Hub, a URL, or a demo."""

import difflib
import os
import re
from pathlib import Path

from astro.errors import CheckpointError

__all__ = ["is_elsewhere", "is_repository", "likely_place", "require_model"]

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_repository(name: str) -> bool:
    """Tell whether a name is that of a repository on the Hub. What lies here under that name comes first.

    Args:
        name: Value of `model.source`.
    """
    return bool(_REPOSITORY.fullmatch(name)) and not Path(name).expanduser().absolute().exists()


def is_elsewhere(name: str) -> bool:
    """Tell whether a name is no path: a URL, a demo, or a repository on the Hub.

    Args:
        name: Value of `model.source`.
    """
    return "://" in name or name.startswith("demo:") or is_repository(name)


def require_model(name: str) -> None:
    """Refuse the path of a model that is not there. It is known at once, before anything slow is imported.

    Args:
        name: Path of a folder; any other name of a model, ORG/NAME@REVISION among them, is left to who reads it.

    Raises:
        CheckpointError: There is no such folder.
    """
    before, *_ = name.split("@")
    if is_elsewhere(name) or is_repository(before):
        return
    if not any(Path(path).expanduser().exists() for path in (name, before)):
        raise CheckpointError(
            f"{name}: no such folder{likely_place(name)}; expected a folder with config.json and *.safetensors, a Hub "
            "repository (ORG/NAME) or a URL of an object store (s3://..., gs://...)"
        )


def likely_place(name: str) -> str:
    """Ask whether another folder was meant: one that is here, and whose path is much like it in one part.

    Args:
        name: Path of a folder that does not exist.

    Returns:
        The end of a sentence; empty where there is no such folder.
    """
    path = Path(name)
    try:
        missing = [place for place in (path, *path.parents) if not place.expanduser().exists()]
        if not missing:
            return ""
        first = missing[-1]
        beside = os.listdir(first.parent.expanduser())
        close = difflib.get_close_matches(first.name, beside, max(len(beside), 1))
        likely = (first.with_name(other) / path.relative_to(first) for other in close)
        found = next((place for place in likely if place.expanduser().is_dir()), None)
    except OSError:  # a part may be no folder, or not be ours to read
        return ""
    return f" (did you mean {found}?)" if found else ""
