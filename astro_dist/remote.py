"""Checkpoints behind a network: a Hub repository or an object store, read by byte ranges.

A tensor is fetched in pieces, several at a time, each tried again when the connection fails; a bounded cache on local
disk keeps them for the other workers of the node. Neither credentials nor connections are part of a store: every
machine finds its own (HF_TOKEN or `hf auth login`; the environment of the object store).
"""

import dataclasses
import functools
import hashlib
import re
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
import pyarrow.fs
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from astro.errors import CheckpointError, ConfigError
from astro.store import Range
from astro_dist.range_cache import RangeCache, cache_folder

__all__ = ["HubFiles", "ObjectFiles", "RemoteStore", "open_hub", "open_url"]

_PIECE_BYTES = 1 << 24
_PARALLEL = 8
_PATIENCE_S = 600.0
"""How long a piece of which nothing comes is asked for again and again."""
_FIRST_WAIT_S, _MAX_WAIT_S = 0.5, 30.0
_LONGEST_ASKED_S = 300.0
"""What a server may ask to wait: the Hub counts requests in windows of five minutes."""
_TIMEOUT_S = 60.0
_URL_OPTIONS = ("region", "scheme", "endpoint_override", "allow_delayed_open", "tls_ca_file_path")
"""Of pyarrow's, those that hold no secret."""
_PASSING = (408, 429, 500, 502, 503, 504)
"""Answers of a server that may be another one in a while."""


_OWN = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
"""Endings of the files that a model is made of."""


class _Passing(Exception):
    """A failure that may not happen again; how long the server asks to wait."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class RemoteFiles(Protocol):
    """Files behind a network."""

    @property
    def revision(self) -> str:
        """What tells this state of the files from every other."""

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file by name."""

    def fetch(self, file: str, start: int, length: int) -> bytes:
        """Some bytes of a file, at most as many as asked for.

        Raises:
            _Passing: it may work if it is tried again.
            CheckpointError: it will not.
        """


@dataclasses.dataclass(frozen=True)
class RemoteStore:
    """A store in front of remote files.

    Attributes:
        files: what is read.
        cache_dir: on each machine; None is the user's own cache there.
        cache_bytes: that the cache may hold; 0 is none.
    """

    files: RemoteFiles
    cache_dir: Path | None
    cache_bytes: int

    def __str__(self) -> str:
        return str(self.files)

    @property
    def revision(self) -> str:
        """Of the files."""
        return self.files.revision

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file by name."""
        return self.files.sizes()

    def fill(self, ranges: Sequence[Range]) -> None:
        """Read byte ranges, in pieces that are the same whichever tensors are asked for together."""
        pieces = [
            dataclasses.replace(wanted, start=wanted.start + offset, view=wanted.view[offset : offset + _PIECE_BYTES])
            for wanted in ranges
            for offset in range(0, len(wanted.view), _PIECE_BYTES)
        ]
        if len(pieces) == 1:
            self._fill_piece(pieces[0])
            return
        with ThreadPoolExecutor(_PARALLEL) as pool:
            for _ in pool.map(self._fill_piece, pieces):
                pass

    def _fill_piece(self, piece: Range) -> None:
        length = len(piece.view)
        key = f"{self.files}|{self.revision}|{piece.file}|{piece.start}|{length}"
        fetch = functools.partial(self._fetch, piece.file, piece.start, length)
        cache = RangeCache((self.cache_dir or cache_folder()) / "pieces", self.cache_bytes)
        piece.view[:] = cache.get(key, length, fetch) if length else b""

    def _fetch(self, file: str, start: int, length: int) -> bytes:
        """Bytes of a file, however many attempts that takes; what has come is kept between them."""
        found, wait_s, attempts, since = b"", _FIRST_WAIT_S, 0, time.monotonic()
        while len(found) < length:
            try:
                more = self.files.fetch(file, start + len(found), length - len(found))
                if not more:
                    raise _Passing(f"ends {length - len(found)} bytes too early")
                found, wait_s, attempts, since = found + more, _FIRST_WAIT_S, 0, time.monotonic()
            except _Passing as error:
                attempts += 1
                if time.monotonic() - since > _PATIENCE_S:
                    raise CheckpointError(
                        f"{self}/{file}: bytes {start} to {start + length} cannot be fetched, tried {attempts} times "
                        f"in {_PATIENCE_S:.0f} s; the last time: {error}. What is finished is kept; run the same "
                        "command to go on"
                    ) from error
                time.sleep(max(wait_s, error.wait_s))
                wait_s = min(2 * wait_s, _MAX_WAIT_S)
        return found


@dataclasses.dataclass(frozen=True)
class HubFiles:
    """A repository of the Hugging Face Hub at one commit.

    Attributes:
        repository: ORG/NAME.
        commit: hash.
        files: name and bytes of every file.
    """

    repository: str
    commit: str
    files: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return f"{self.repository}@{self.commit[:12]}"

    @property
    def revision(self) -> str:
        """The commit."""
        return self.commit

    def sizes(self) -> dict[str, int]:
        """Bytes of every file at the root of the repository by name."""
        return {name: size for name, size in self.files if "/" not in name}

    def fetch(self, file: str, start: int, length: int) -> bytes:
        """Some bytes of a file; fewer where the connection ends early."""
        url = huggingface_hub.hf_hub_url(self.repository, file, revision=self.commit)
        asked = f"bytes {start}-{start + length - 1}/{self.sizes()[file]}"
        # Not compressed: a range of a compressed form would be other bytes.
        headers = {
            **build_hf_headers(), "Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity",
        }  # fmt: skip
        found = bytearray()
        try:
            with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True) as answer:
                self._require_range(file, answer, asked)
                for part in answer.iter_raw():
                    found += part
                    if len(found) >= length:
                        break
        except (CheckpointError, _Passing):
            raise
        except hub_errors.OfflineModeIsEnabled as error:
            raise CheckpointError(f"{self}: {error}") from error
        except Exception as error:  # of whichever HTTP library huggingface_hub is built on
            if not found:
                raise _Passing(f"{type(error).__name__}: {_without_query(str(error))}") from error
        return bytes(found[:length])

    def _require_range(self, file: str, answer: Any, asked: str) -> None:
        """Refuse any answer but the range that was asked for, before its content is read."""
        status = answer.status_code
        if status in _PASSING:
            raise _Passing(f"the Hub answers {status}", _retry_after(answer.headers))
        if status >= 400:
            answer.read()
            try:
                hf_raise_for_status(answer)
            except hub_errors.HfHubHTTPError as error:
                raise _refused(self.repository, self.commit, error) from error
        if status != 206:  # it would send the whole file each time
            raise CheckpointError(f"{self}/{file}: the server does not send byte ranges (it answers {status})")
        got = answer.headers.get("Content-Range")
        if got != asked or answer.headers.get("Content-Encoding", "identity") != "identity":
            raise CheckpointError(f"{self}/{file}: asked for {asked}, the server sends {got}; the file is another one")


def open_hub(repository: str, revision: str) -> HubFiles:
    """Find the commit that a branch, tag or commit of a Hub repository is at, and its files.

    Raises:
        CheckpointError: the repository or revision is missing, gated or cannot be reached, with the Hub's reason.
    """
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
    except hub_errors.HFValidationError as error:
        raise ConfigError(f"model.source {repository}: {error}") from error
    except hub_errors.HfHubHTTPError as error:
        raise _refused(repository, revision, error) from error
    except hub_errors.OfflineModeIsEnabled as error:
        raise CheckpointError(
            f"{repository}: no such folder here, and the Hub is not asked: HF_HUB_OFFLINE is set"
        ) from error
    except Exception as error:  # of whichever HTTP library huggingface_hub is built on
        raise CheckpointError(
            f"{repository}: no such folder here, and the Hub cannot be reached: {type(error).__name__}: {error}; "
            "correct model.source, or see to the network (a proxy, HF_ENDPOINT)"
        ) from error
    files = tuple((file.rfilename, int(file.size or 0)) for file in info.siblings or ())
    return HubFiles(repository, str(info.sha), files)


def _refused(repository: str, revision: str, error: hub_errors.HfHubHTTPError) -> CheckpointError:
    """What the Hub says, and what to do."""
    said = error.server_message or _without_query(" ".join(str(error).split()))
    if isinstance(error, hub_errors.GatedRepoError):
        advice = (
            f"ask for access at https://huggingface.co/{repository}, then give every machine a token that has it "
            "(HF_TOKEN or `hf auth login`)"
        )
    elif isinstance(error, hub_errors.RevisionNotFoundError):
        advice = f"it has no branch, tag or commit {revision!r}; correct model.revision"
    elif isinstance(error, hub_errors.RepositoryNotFoundError):
        advice = "there is no such folder here either; correct model.source, or give a token where it is private"
    else:
        advice = "see https://status.huggingface.co, or give a valid token"
    return CheckpointError(f"model.source {repository}: the Hub refuses: {said}; {advice}")


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return min(float(headers.get("Retry-After", 0)), _LONGEST_ASKED_S)
    except ValueError:
        return 0.0


def _without_query(text: str) -> str:
    """A message without what stands behind a `?` in URLs: signatures of links that are as good as a password."""
    return re.sub(r"\?[^\s'\"]+", "?...", text)


@dataclasses.dataclass(frozen=True)
class ObjectFiles:
    """A folder of an object store, or of any file system that pyarrow or fsspec opens.

    Attributes:
        url: e.g. s3://bucket/folder, with pyarrow's options behind a `?`.
        files: name, bytes and time of change of every file.
    """

    url: str
    files: tuple[tuple[str, int, int], ...]

    def __str__(self) -> str:
        return self.url.partition("?")[0].rstrip("/")

    @property
    def revision(self) -> str:
        """A hash of names, sizes and times of change of all that belongs to a model."""
        own = [file for file in self.files if file[0].endswith(_OWN)]
        return hashlib.sha256(repr(own).encode()).hexdigest()

    def sizes(self) -> dict[str, int]:
        """Bytes of every file by name."""
        return {name: size for name, size, _ in self.files}

    def fetch(self, file: str, start: int, length: int) -> bytes:
        """Some bytes of a file, if that is still what it was when the run began."""
        try:
            system, folder = _file_system(self.url)
            with system.open_input_file(f"{folder}/{file}") as handle:
                found = bytes(handle.read_at(length, start))
            # After the bytes were read: if it has not changed by now, they are of the state that was listed.
            now = _described(system.get_file_info(f"{folder}/{file}"))
        except Exception as error:  # of whichever library is behind the URL
            raise _Passing(f"{type(error).__name__}: {_without_query(str(error))}") from error
        if now not in self.files:
            raise CheckpointError(f"{self}/{file}: has changed, or is gone, since the run began; begin a new run")
        return found


def open_url(url: str) -> ObjectFiles:
    """List a folder behind a URL.

    Raises:
        ConfigError: a URL of no known kind, or one that holds credentials.
        CheckpointError: it cannot be listed, or is empty.
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
        found = system.get_file_info(pyarrow.fs.FileSelector(folder))
    except ConfigError:
        raise
    except Exception as error:  # of whichever library is behind the URL
        reason = _without_query(" ".join(str(error).split()))
        raise CheckpointError(f"model.source {place}: cannot be listed: {reason}") from error
    files = [_described(info) for info in found if info.is_file]
    if not files:
        raise CheckpointError(f"model.source {place}: holds no files")
    if not all(changed for _, _, changed in files):
        raise ConfigError(
            f"model.source {place}: its listing does not say when files were changed, so that a run could not tell one "
            "state of them from another; copy the model into a folder or a bucket"
        )
    return ObjectFiles(url, tuple(sorted(files)))


def _described(info: Any) -> tuple[str, int, int]:
    """Name, bytes and time of change; 0 where there is none."""
    return (info.base_name, int(info.size or 0), int(info.mtime_ns or 0))


@functools.lru_cache(maxsize=8)
def _file_system(url: str) -> tuple[Any, str]:
    """File system and path of a URL, one for each process."""
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
