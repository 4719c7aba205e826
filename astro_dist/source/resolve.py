"""Find the source of a model: a folder, a Hub repository, an object store or a demo."""

import dataclasses
import fnmatch
import re
from pathlib import Path

from astro.errors import CheckpointError, ConfigError
from astro.storage.atomic import write_bytes
from astro.storage.byte_store import FolderStore, Range, Store
from astro_dist.config.schema import ModelConfig
from astro_dist.source.demo import resolve_demo
from astro_dist.source.range_cache import cache_folder

__all__ = ["SIDE_FILES", "Source", "resolve_source"]

SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "*.tiktoken", "spiece.model", "*.spm", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Names, or patterns of names, of what belongs to a model beside shards, index and config.json."""
_MAX_SIDE_FILE_BYTES = 256_000_000
_REPOSITORY, _OTHER = re.compile(r"\w[\w.-]*/\w[\w.-]*"), re.compile(r"[^\w.-]+")


@dataclasses.dataclass(frozen=True)
class Source:
    """A source says where the files of a checkpoint are.

    Attributes:
        store: Store of all files of the checkpoint.
        folder: Folder on this machine with config.json, tokenizer and code: the checkpoint itself, or a copy of these.
        commit: Commit of the Hub repository; None for any other source.
    """

    store: Store
    folder: Path
    commit: str | None = None

    @property
    def is_remote(self) -> bool:
        """Tell whether the weights are no files of this machine."""
        return not isinstance(self.store, FolderStore)


def resolve_source(model: ModelConfig, commit: str | None = None) -> Source:
    """Find what `model.source` names. From a remote source only config.json and the like are fetched, no weights.

    Args:
        model: Section of the configuration that names the source.
        commit: Commit of the Hub repository that the run was begun with, which is then used instead of
            `model.revision`; None for a new run.

    Raises:
        InputError: The source does not exist, or cannot be reached.
    """
    name = model.source
    if model.cache_dir is not None and not model.cache_dir.expanduser().is_absolute():
        raise ConfigError(f"model.cache_dir: {model.cache_dir} is relative, which is another folder in every process")
    cache_dir = model.cache_dir.expanduser() if model.cache_dir is not None else None
    folder = Path(name).expanduser().absolute()
    is_repository = bool(_REPOSITORY.fullmatch(name)) and not folder.exists()
    if model.revision is not None and not is_repository:
        raise ConfigError(f"model.revision: only a Hub repository has revisions, {name} is none")
    if name.startswith("demo:"):
        folder = resolve_demo(name)
    if "://" not in name and not is_repository:
        return Source(FolderStore(folder), folder)
    from astro_dist.source.hub_repository import open_hub  # slow to import, and mostly not needed
    from astro_dist.source.object_store import open_url
    from astro_dist.source.remote_store import RemoteStore

    files = open_hub(name, commit or model.revision or "main") if is_repository else open_url(name)
    store = RemoteStore(files, cache_dir, int(model.cache_gb * 1e9))
    side_files = (cache_dir or cache_folder()) / "side" / f"{_OTHER.sub('-', str(files))}-{files.revision[:16]}"
    _fetch_side_files(store, side_files, model.trust_remote_code)
    return Source(store, side_files, files.revision if is_repository else None)


def _fetch_side_files(store: Store, folder: Path, with_code: bool) -> None:
    patterns = ("config.json", *SIDE_FILES, *(("*.py",) if with_code else ()))
    for file, size in store.sizes().items():
        if not any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns) or (folder / file).is_file():
            continue
        if size > _MAX_SIDE_FILE_BYTES:
            raise CheckpointError(f"{store}/{file}: {size / 1e6:.0f} MB are too much for such a file")
        content = bytearray(size)
        store.fill([Range(file, 0, memoryview(content))])
        write_bytes(folder / file, content)
