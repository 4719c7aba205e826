"""List the files of a finished model, each with its size and SHA-256. The list is written last: the model is whole."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from astro.errors import ConfigError, DamagedError
from astro.storage.atomic import sha256_of, write_json, write_text
from astro_dist.run_directory.records import RunDirectory, read_own_json
from astro_dist.run_directory.summary import read_summary
from astro_dist.run_directory.unit_record import FileRecord

__all__ = [
    "CARD_NAME",
    "all_shards",
    "damaged_files",
    "describe",
    "is_whole",
    "read_inventory",
    "replace_card",
    "seal",
    "shards_of",
    "write_inventory",
]

CARD_NAME = "README.md"
"""Name of the card's file, as the Hub wants it."""


def describe(folder: Path, name: str) -> FileRecord:
    """Describe a file as it is now.

    Args:
        folder: Folder of the model.
        name: Path of the file in the folder, with `/` between folders.
    """
    return FileRecord(name, (folder / name).stat().st_size, sha256_of(folder / name))


def shards_of(run: RunDirectory, unit: str) -> list[FileRecord]:
    """List the files of the model that a finished unit wrote; a unit of an earlier round wrote none.

    Args:
        run: Run directory.
        unit: Name of the unit.

    Raises:
        DamagedError: The unit's record cannot be read.
    """
    return _shards(run.files(unit))


def all_shards(run: RunDirectory) -> dict[str, FileRecord]:
    """Return every shard of the model by name, as far as the records of its units can be read.

    Args:
        run: Run directory.
    """
    return {file.name: file for record in run.readable_records() for file in _shards(record.files)}


def write_inventory(run: RunDirectory, names: Iterable[str], known: Mapping[str, FileRecord]) -> None:
    """Write the inventory, which says that the model is whole.

    Args:
        run: Run directory.
        names: Names of all files of the model.
        known: Files that need not be read again, because a record describes them, by name.
    """
    files = [known.get(name) or describe(run.model, name) for name in sorted(names)]
    write_json(run.inventory, {"files": [file.to_json() for file in files]})


def seal(run: RunDirectory, shards: Mapping[str, FileRecord], names: Iterable[str], card: str) -> None:
    """Write the card and then the inventory, which says that the model is whole.

    Args:
        run: Run directory.
        shards: Shards of the model by name, as their records have them.
        names: Names of the files beside the shards.
        card: Text of the card.
    """
    write_text(run.model / CARD_NAME, card)
    write_inventory(run, {*shards, *names, CARD_NAME}, shards)


def replace_card(run: RunDirectory, card: str) -> None:
    """Replace the card of a finished model.

    Args:
        run: Run directory.
        card: Text of the card.

    Raises:
        ConfigError: The model is not finished.
        DamagedError: The inventory cannot be read.
    """
    seal(run, {file.name: file for file in read_inventory(run) if file.name != CARD_NAME}, (), card)


def is_whole(run: RunDirectory, shards: Mapping[str, FileRecord]) -> bool:
    """Tell whether the figures of the run and all files beside the shards are as they were written.

    Args:
        run: Run directory.
        shards: Shards of the model by name, which are not looked at.
    """
    if not (run.summary.is_file() and run.inventory.is_file()):
        return False
    try:
        read_summary(run.summary)
        files = [file for file in read_inventory(run) if file.name not in shards]
    except DamagedError as error:
        run.journal.note("damaged", unit="model", reason=f"{error}; it is written again")
        return False
    return all((run.model / file.name).is_file() and describe(run.model, file.name) == file for file in files)


def damaged_files(run: RunDirectory) -> list[str]:
    """List the names of the files of the finished model that are gone, or of another size than was written.

    Args:
        run: Run directory.

    Raises:
        ConfigError: The model is not finished.
        DamagedError: The inventory cannot be read.
    """
    paths = {file: run.model / file.name for file in read_inventory(run)}
    return [
        file.name for file, path in paths.items() if not (path.is_file() and path.stat().st_size == file.size_bytes)
    ]


def read_inventory(run: RunDirectory) -> list[FileRecord]:
    """Read which files the finished model consists of, sorted by name.

    Args:
        run: Run directory.

    Raises:
        ConfigError: The model is not finished.
        DamagedError: The inventory cannot be read.
    """
    if not run.inventory.is_file():
        raise ConfigError(
            f"{run.root}: its model is not finished, {run.inventory.name} is missing; run `astro-dist quantize` first"
        )
    content = read_own_json(run.inventory)
    try:
        return [FileRecord.from_json(file) for file in content["files"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(run.inventory, f"it is incomplete ({error!r})") from error


def _shards(files: Iterable[FileRecord]) -> list[FileRecord]:
    paths = ((Path(file.name), file) for file in files)
    return [FileRecord(path.name, file.size_bytes, file.sha256) for path, file in paths if path.parent == Path("model")]
