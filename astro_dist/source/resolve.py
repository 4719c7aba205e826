"""Find the source of a model: a folder, a Hub repository, an object store or a demo."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from astro.errors import ConfigError
from astro.storage.atomic import write_bytes
from astro.storage.byte_store import FolderStore, Range, Store
from astro_dist.config.model_place import is_repository, require_model
from astro_dist.config.schema import ModelConfig
from astro_dist.source.demo import resolve_demo
from astro_dist.source.range_cache import cache_folder
from astro_dist.source.side_files import RUN_FILE, large_files, list_folder, side_files

__all__ = ["Source", "fetch_side_files", "resolve_source"]

_OTHER = re.compile(r"[^\w.-]+")


@dataclasses.dataclass(frozen=True)
class Source:
    """A source says where the files of a checkpoint are.

    Attributes:
        store: Store of all files of the checkpoint.
        folder: Folder on this machine with config.json, tokenizer and code: the checkpoint itself, or a copy of these.
        commit: Commit of the Hub repository; None for any other source.
        remote_sizes: Size in bytes of every file of a remote source by its path; empty for a folder.
    """

    store: Store
    folder: Path
    commit: str | None = None
    remote_sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def is_remote(self) -> bool:
        """Tell whether the weights are no files of this machine."""
        return not isinstance(self.store, FolderStore)

    def large_files(self) -> list[str]:
        """List the files beside the weights that are too large to be copied."""
        return large_files(self.remote_sizes if self.is_remote else list_folder(self.folder))


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
    on_hub = is_repository(name)
    if model.revision is not None and not on_hub:
        raise ConfigError(f"model.revision: only a Hub repository has revisions, {name} is none")
    if name.startswith("demo:"):
        folder = resolve_demo(name)
    if "://" not in name and not on_hub:
        require_model(name)
        if (folder / RUN_FILE).is_file():
            raise ConfigError(f"{folder}: is a run directory and no model; its result is {folder / 'model'}")
        return Source(FolderStore(folder), folder)
    from astro_dist.source.hub_repository import open_hub  # slow to import, and mostly not needed
    from astro_dist.source.object_store import open_url
    from astro_dist.source.remote_store import RemoteStore

    files = open_hub(name, commit or model.revision or "main") if on_hub else open_url(name)
    store = RemoteStore(files, cache_dir, int(model.cache_gb * 1e9))
    copies = (cache_dir or cache_folder()) / "side" / f"{_OTHER.sub('-', str(files))}-{files.revision[:16]}"
    sizes = files.every_size()
    source = Source(store, copies, files.revision if on_hub else None, sizes)
    fetch_side_files(source)
    return source


def fetch_side_files(source: Source) -> None:
    """Fetch the files of a remote model that are not weights, where this machine lacks them. Code is only stored.

    Args:
        source: The source.
    """
    sizes = source.remote_sizes
    for file in ("config.json", *side_files(sizes)):
        if file not in sizes or (source.folder / file).is_file():
            continue
        content = bytearray(sizes[file])
        source.store.fill([Range(file, 0, memoryview(content))])
        write_bytes(source.folder / file, content)
