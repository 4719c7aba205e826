"""Read files of a folder in an object store, or in any file system that pyarrow or fsspec opens."""

import dataclasses
import functools
import hashlib
import urllib.parse
from typing import Any

import pyarrow.fs

from astro.errors import CheckpointError, ConfigError
from astro_dist.source.remote_store import Passing, without_query

__all__ = ["ObjectFiles", "open_url"]

_URL_OPTIONS = ("region", "scheme", "endpoint_override", "allow_delayed_open", "tls_ca_file_path")
"""Options of pyarrow that hold no secret."""
_MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
"""Endings of the files that a model is made of."""


@dataclasses.dataclass(frozen=True)
class ObjectFiles:
    """Object files lie in a folder of an object store, or in any file system that pyarrow or fsspec opens.

    Attributes:
        url: URL of the folder, such as s3://bucket/folder, with pyarrow's options behind a `?`.
        files: Name, size in bytes and time of change in nanoseconds of every file.
    """

    url: str
    files: tuple[tuple[str, int, int], ...]

    def __str__(self) -> str:
        return self.url.partition("?")[0].rstrip("/")

    @property
    def revision(self) -> str:
        """Return a hash over names, sizes and times of change of all files that belong to a model."""
        model_files = [file for file in self.files if file[0].endswith(_MODEL_SUFFIXES)]
        return hashlib.sha256(repr(model_files).encode()).hexdigest()

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file, by name."""
        return {name: size for name, size, _ in self.files}

    def every_size(self) -> dict[str, int]:
        """Return the size in bytes of every file, by name: folders within the folder are not listed."""
        return self.sizes()

    def fetch(self, file: str, start: int, length: int) -> bytes:
        """Fetch some bytes of a file that has not changed since it was listed.

        Args:
            file: Name of the file.
            start: Offset of the first byte.
            length: Number of bytes.

        Raises:
            Passing: The request may work later.
            CheckpointError: The file has changed, or is gone.
        """
        try:
            system, folder = _file_system(self.url)
            with system.open_input_file(f"{folder}/{file}") as handle:
                content = bytes(handle.read_at(length, start))
            # After the bytes were read: if it has not changed by now, they are of the state that was listed.
            now = _described(system.get_file_info(f"{folder}/{file}"))
        except Exception as error:  # of whichever library is behind the URL
            raise Passing(f"{type(error).__name__}: {without_query(str(error))}") from error
        if now not in self.files:
            raise CheckpointError(f"{self}/{file}: has changed, or is gone, since the run began; begin a new run")
        return content


def open_url(url: str) -> ObjectFiles:
    """List a folder behind a URL.

    Args:
        url: URL of the folder, with pyarrow's options behind a `?`.

    Raises:
        ConfigError: The URL is of no known kind, or may hold credentials, or its files have no time of change.
        CheckpointError: The folder cannot be listed, or is empty.
    """
    parts = urllib.parse.urlsplit(url)
    others = {name for name, _ in urllib.parse.parse_qsl(parts.query, keep_blank_values=True)} - {*_URL_OPTIONS}
    if parts.password is not None or (parts.username is not None and parts.scheme == "s3") or others:
        raise ConfigError(
            "model.source: the URL may hold credentials, which would be written into the run's records; give them to "
            "each machine by its environment (e.g. AWS_ACCESS_KEY_ID). Allowed behind a `?` are "
            f"{', '.join(_URL_OPTIONS)}"
        )
    place = url.partition("?")[0]
    try:
        system, folder = _file_system(url)
        infos = system.get_file_info(pyarrow.fs.FileSelector(folder))
    except ConfigError:
        raise
    except Exception as error:  # of whichever library is behind the URL
        reason = without_query(" ".join(str(error).split()))
        raise CheckpointError(f"model.source {place}: cannot be listed: {reason}") from error
    files = [_described(info) for info in infos if info.is_file]
    if not files:
        raise CheckpointError(f"model.source {place}: holds no files")
    if not all(changed for _, _, changed in files):
        raise ConfigError(
            f"model.source {place}: its listing does not say when files were changed, so that a run could not tell one "
            "state of them from another; copy the model into a folder or a bucket"
        )
    return ObjectFiles(url, tuple(sorted(files)))


def _described(info: Any) -> tuple[str, int, int]:
    """Return name, size in bytes and time of change in nanoseconds of a file; 0 for what is not known."""
    return (info.base_name, int(info.size or 0), int(info.mtime_ns or 0))


@functools.lru_cache(maxsize=8)
def _file_system(url: str) -> tuple[Any, str]:
    """Open the file system of a URL, once in each process, and return it with the path in it."""
    try:
        system, folder = pyarrow.fs.FileSystem.from_uri(url)
        return system, folder
    except pyarrow.ArrowInvalid as first:  # a kind that pyarrow does not know
        import fsspec  # knows more, each with a package of its own

        try:
            inner, folder = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"model.source {url}: {error} ({first})") from error
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(inner)), folder
