"""Read a dataset of the Hugging Face Hub at one commit, with the library `datasets`. No code of a dataset runs."""

import contextlib
import glob
import random
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from astro.errors import ConfigError
from astro_dist.config.schema import TextSource
from astro_dist.source.hub_errors import without_secrets
from astro_dist.source.rows import Row, Rows, as_row, choose_column, size_of
from astro_dist.source.sampling import NUM_PIECES, SMALLEST_PIECE, sampled

__all__ = ["read_dataset", "rows_in_order"]

_READERS = {
    "parquet": "parquet", "jsonl": "json", "json": "json", "ndjson": "json", "csv": "csv", "arrow": "arrow",
}  # fmt: skip
"""Readers of `datasets` by the ending of a file. Others of its readers run code that files hold (pickle), or read no
text."""
_CARD = "README.md"
_SMALL_FILES = [_CARD, ".gitattributes"]
"""Files that nearly every dataset has; with one of them the folder of a commit is in the cache."""
_KEPT_BYTES = 64 << 20
"""Bytes up to which the files of a split are downloaded whole, so that the run can go on without the Hub."""
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)(\..*)?")


def read_dataset(
    source: TextSource, num_characters: int, seed: int, commit: str | None = None
) -> tuple[Rows, str, list[str]]:
    """Read rows of a split until there are enough.

    Row groups of parquet files are read in an order that the seed gives, so that they come from all over the split.
    Rows of a group keep their order, because those of some datasets are lines of one text. Files that are in the Hub's
    cache are read there. Those of a small split are downloaded to it, of a larger split only what is needed is read.

    Args:
        source: Name, subset, split, revision and column.
        num_characters: Number of characters that are enough.
        seed: Seed of the order.
        commit: Commit that is read instead of the revision; None for a new run.

    Returns:
        The rows, the commit that they are from, and sentences that the user should read.

    Raises:
        ConfigError: The package `datasets` is not installed, or the dataset cannot be read; the message says why.
    """
    notes = list[str]()
    with _split(source, "calibration.source", commit, notes) as (table, folder):
        rows = _read(table, source.column, max(num_characters, NUM_PIECES * SMALLEST_PIECE), seed)
    return rows, folder.name, notes


def rows_in_order(source: TextSource, option: str) -> Iterator[tuple[Any, str]]:
    """Yield every row of a split in its order, the empty ones too, each with the name of its column.

    Args:
        source: Name, subset, split, revision and column.
        option: Option or key that names the dataset, for messages.

    Raises:
        ConfigError: The package `datasets` is not installed, or the dataset cannot be read; the message says why.
    """
    with _split(source, option, None, []) as (table, _):
        column = choose_column(_columns(table), source.column)
        for example in table.select_columns([column]):
            yield example[column], column


@contextlib.contextmanager
def _split(source: TextSource, option: str, commit: str | None, notes: list[str]) -> Iterator[tuple[Any, Path]]:
    """Open the table of a split, with the folder of its commit. What goes wrong becomes an error that says so."""
    name = source.source
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{option} {name}: is no file here, and to read a dataset of the Hub the package `datasets` is missing; "
            "run: pip install 'datasets>=4.6'"
        ) from error
    try:
        with _quiet(datasets), tempfile.TemporaryDirectory() as scratch:
            folder = _snapshot(name, commit or source.revision or "main", _SMALL_FILES)
            places = _places(source, folder, notes)
            # The cache of `datasets` is not asked: it does not tell one commit from another.
            table = datasets.load_dataset(
                _reader(places), data_files=places, split="train", streaming=True, cache_dir=scratch
            )
            yield table, folder
    except ConfigError:
        raise
    except Exception as error:  # of whichever library reads such files, or speaks with the Hub
        raise ConfigError(f"{option} {name}: {_explain(error, source)}") from error


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Show no progress bars of the libraries."""
    were_shown = not huggingface_hub.utils.are_progress_bars_disabled()
    huggingface_hub.utils.disable_progress_bars()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            huggingface_hub.utils.enable_progress_bars()


def _snapshot(name: str, revision: str, files: list[str]) -> Path:
    """Return the folder of a commit in the Hub's cache, with some of its files; it is called like the commit."""
    patterns = [glob.escape(file) for file in files]
    return Path(
        huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)
    )


def _places(source: TextSource, folder: Path, notes: list[str]) -> list[str]:
    """Return the paths or addresses of the files of a split."""
    name, commit = source.source, folder.name
    if constants.HF_HUB_OFFLINE:
        try:
            files = _data_files(source, folder, str(folder))
        except FileNotFoundError as error:
            raise LocalEntryNotFoundError(str(error)) from error
        _require_all_parts(files)
        return files
    base = f"hf://datasets/{name}@{commit}"
    files = [file.removeprefix(f"{base}/") for file in _data_files(source, folder, base)]
    if not all((folder / file).is_file() for file in files):
        info = huggingface_hub.HfApi().dataset_info(name, revision=commit, files_metadata=True)
        sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
        size_bytes = sum(sizes[file] for file in files)
        if size_bytes > _KEPT_BYTES:
            notes.append(
                f"calibration text {name}: only what is needed of {size_bytes / 1e9:.1f} GB is read from the Hub, at "
                f"commit {commit}; to go on without the Hub, run: hf download {name} --repo-type dataset --revision "
                f"{commit}"
            )
            return [f"{base}/{file}" for file in files]
        _snapshot(name, commit, files)
    return [str(folder / file) for file in files]


def _data_files(source: TextSource, folder: Path, base: str) -> list[str]:
    """List the files of a split, as the dataset's card says, or as their names say where it says nothing."""
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs

    card, subsets = folder / _CARD, MetadataConfigs()
    if card.is_file():
        subsets = MetadataConfigs.from_dataset_card_data(huggingface_hub.DatasetCard.load(card).data)
    entry: Mapping[str, Any] = {"data_dir": source.subset or ""}
    if subsets:
        subset = source.subset or subsets.get_default_config_name()
        if subset not in subsets:
            missing = f"has no subset {subset!r}" if subset else "has several subsets and no default one"
            raise ValueError(f"it {missing}; set `subset` to one of {', '.join(subsets)}")
        entry = subsets[subset]
    place = f"{base}/{entry['data_dir']}".rstrip("/") if entry.get("data_dir") else base
    patterns = sanitize_patterns(entry["data_files"]) if "data_files" in entry else get_data_patterns(place)
    splits = {str(split): found for split, found in patterns.items()}
    if source.split not in splits:
        raise ValueError(f"it has no split {source.split!r}; set `split` to one of {', '.join(splits)}")
    endings = [f".{ending}" for ending in _READERS]
    files = DataFilesDict.from_patterns(
        {source.split: splits[source.split]}, base_path=place, allowed_extensions=endings
    )
    astray = next((file for file in files[source.split] if not _is_inside(file, base)), None)
    if astray is not None:
        raise ValueError(f"its card names {astray}, which is no file of the dataset; such a file is never read")
    if not files[source.split]:
        raise FileNotFoundError(f"{', '.join(map(str, splits[source.split]))} in {base}")
    return sorted(set(files[source.split]))


def _is_inside(file: str, base: str) -> bool:
    """Tell whether the path or address of a file is below that of its dataset."""
    return file.startswith(f"{base}/") and ".." not in file.split("/")


def _require_all_parts(files: list[str]) -> None:
    """Refuse a split of which the cache holds some files only, where their names tell how many there are."""
    for match in filter(None, map(_NUMBERED.fullmatch, files)):
        parts = [file for file in files if file.startswith(f"{match[1]}-") and f"-of-{match[3]}" in file]
        if len(parts) < int(match[3]):
            raise LocalEntryNotFoundError(f"the cache holds {len(parts)} of {int(match[3])} files {match[1]}-*")


def _reader(files: list[str]) -> str:
    """Return the name of the reader of some files."""
    endings = {Path(file.removesuffix(".gz").removesuffix(".zst")).suffix.lstrip(".").lower() for file in files}
    if len(endings) != 1 or not endings <= _READERS.keys():
        raise ValueError(f"its files end in .{', .'.join(sorted(endings))}; expected one of .{', .'.join(_READERS)}")
    return _READERS[endings.pop()]


def _read(table: Any, asked: str, num_characters: int, seed: int) -> Rows:
    """Read rows that are not empty until there are enough."""
    column = choose_column(_columns(table), asked)
    table = table.select_columns([column]).reshard()
    # Not its own shuffling, which mixes rows, in a way that changed between versions.
    order = random.Random(seed).sample(range(table.num_shards), table.num_shards)
    taken: list[Row] = []
    size = 0
    for example in (example for index in order for example in table.shard(table.num_shards, index)):
        row = as_row(example[column], column)
        if row is None:
            continue
        for piece in sampled([row], size_of(row), num_characters, seed):
            taken.append(piece)
            size += size_of(piece)
        if size >= num_characters:
            break
    return Rows(taken, column)


def _columns(table: Any) -> list[str]:
    """Return the names of a table's columns; of rows without a schema those of the first, none where there is none."""
    return list(table.features or next(iter(table), {}))


def _explain(error: Exception, source: TextSource) -> str:
    """Say what went wrong and what to do."""
    name, reason = source.source, without_secrets(" ".join(str(error).split()))
    if isinstance(error, GatedRepoError):
        return f"access has to be asked for at https://huggingface.co/datasets/{name}; then set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no branch, tag or commit {source.revision or 'main'!r}; correct `revision`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such file here, and the Hub has no such dataset, or shows it to its owners only; correct the "
            "name, or set HF_TOKEN"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"it is not in the Hub's cache as a whole, and the Hub cannot be reached or is not asked (HF_HUB_OFFLINE): "
            f"{reason}; where there is a network, run: hf download {name} --repo-type dataset"
        )
    if isinstance(error, (EntryNotFoundError, FileNotFoundError)):
        return (
            f"no files that end in .{', .'.join(_READERS)} were found ({reason}); code in a dataset is never run: if "
            "it has a script, try `revision`: refs/convert/parquet, where the Hub keeps what scripts gave"
        )
    return f"cannot be read: {reason}"
