"""What a place is that holds no model which can be read, and what to give instead."""

import re
from collections.abc import Mapping
from pathlib import Path

from astro.storage.byte_store import FolderStore, Store

__all__ = ["LFS_POINTER", "what_it_is"]

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""Beginning of the small file that git leaves in place of a large one."""
_ANSWERS = (
    (
        re.compile(r"adapter_(config\.json|model\..*)"),
        "is an adapter (LoRA), not a model; merge it into its base model (PEFT: merge_and_unload, then "
        "save_pretrained) and give the merged model",
    ),
    (
        re.compile(r".*\.gguf"),
        "a GGUF file holds weights that are quantized already; quantizing them again adds their error to ours. Give "
        "the original safetensors checkpoint of the model",
    ),
    (
        re.compile(r"model-\d+-of-\d+\.safetensors"),
        "holds {count} shards, the first is {first}, but not model.safetensors.index.json, which says what is in them; "
        "fetch that file too, and every shard that it names",
    ),
    (
        re.compile(r"consolidated.*"),
        "holds {first}, the model in its maker's own layout, and no files in that of transformers; give the repository "
        "or folder with model.safetensors (its name may end in -hf), or convert it with the script of transformers",
    ),
    (
        re.compile(r"model_index\.json"),
        "is a pipeline of diffusers, not a language model; give a causal language model",
    ),
    (
        re.compile(r".*\.(bin|pt|pth|ckpt)"),
        "holds {first} but no safetensors; such a file is a pickle, which runs code when it is loaded, and is not "
        "read. Convert it (transformers: save_pretrained) or fetch the safetensors revision",
    ),
    (
        re.compile(r".*\.safetensors"),
        "holds {first} but no model.safetensors; a single file of weights must have that name",
    ),
)
"""What a place is by the names of files in it, the first that fits."""
_CACHED = "models--"
"""Beginning of the names of folders in the Hub's cache; `--` stands for the `/` of the repository."""


def what_it_is(store: Store, sizes: Mapping[str, int]) -> str:
    """Say what a place is that has neither an index nor a single file of safetensors, and what to give.

    Args:
        store: Store of the place.
        sizes: Size in bytes of every file directly in it, by name.

    Returns:
        The message of an error.
    """
    reason = _of_files(sizes) or (_of_folders(store.folder) if isinstance(store, FolderStore) else None)
    neither = "holds neither model.safetensors.index.json nor model.safetensors, and no folder that does"
    return f"{store}: {reason or neither}"


def _of_files(sizes: Mapping[str, int]) -> str | None:
    """Say what a place is by the files in it; None where they do not tell."""
    for pattern, answer in _ANSWERS:
        fitting = sorted(name for name in sizes if pattern.fullmatch(name))
        if fitting:
            return answer.format(first=fitting[0], count=len(fitting))
    return None


def _of_folders(folder: Path) -> str | None:
    """Say what a folder is by the folders in and above it; None where they do not tell."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    cached = [name for name in names if name.startswith(_CACHED)]
    if cached:
        return (
            f"is the Hub's cache of {len(cached)} models, not a model; give the name of one as model.source, such as "
            f"{_repository(cached[0])}"
        )
    snapshots = folder if folder.name == "snapshots" else folder / "snapshots"
    if snapshots.parent.name.startswith(_CACHED) and snapshots.is_dir():
        return (
            f"is a folder of the Hub's cache, not a model; give {_repository(snapshots.parent.name)} as model.source, "
            f"or a folder in {snapshots}"
        )
    if (folder / "model").is_dir() and (folder / "run.json").is_file():
        return f"is the directory of a run; the model of a run is in its `model`, {folder / 'model'}"
    inner = [name for name in names if any((folder / name).glob("*.safetensors"))]
    return f"holds no model itself, but {folder / inner[0]} holds weights; give that folder" if inner else None


def _repository(cached: str) -> str:
    return cached.removeprefix(_CACHED).replace("--", "/", 1)
