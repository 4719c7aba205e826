"""What a finished model consists of: every file with its size and SHA-256, written last, when the model is whole."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from astro.errors import ConfigError, DamagedError
from astro.storage.atomic import sha256_of, write_json, write_text
from astro_dist.run_directory.records import RunDirectory, read_own_json
from astro_dist.run_directory.summary import read_summary
from astro_dist.run_directory.unit_record import FileRecord

__all__ = [
    "CARD_NAME",
    "ModelFile",
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


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A file of the model as it was written.

    Attributes:
        name: Name of the file in the model's folder.
        size_bytes: Size of the file in bytes.
        sha256: SHA-256 of the file's bytes, hex.
    """

    name: str
    size_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """The entry as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` gave.

        Args:
            content: JSON object with every field.
        """
        return cls(str(content["name"]), int(content["size_bytes"]), str(content["sha256"]))


def describe(path: Path) -> ModelFile:
    """Describe a file as it is now.

    Args:
        path: Path of the file.
    """
    return ModelFile(path.name, path.stat().st_size, sha256_of(path))


def shards_of(run: RunDirectory, unit: str) -> list[ModelFile]:
    """The final files of the model that a finished unit wrote; a unit of an earlier round wrote none.

    Args:
        run: Run directory.
        unit: Name of the unit.

    Raises:
        DamagedError: The unit's record cannot be read.
    """
    return _shards(run.files(unit))


def all_shards(run: RunDirectory) -> dict[str, ModelFile]:
    """Every shard of the model by name, as the records have them that can be read.

    Args:
        run: Run directory.
    """
    return {file.name: file for record in run.readable_records() for file in _shards(record.files)}


def write_inventory(run: RunDirectory, names: Iterable[str], known: Mapping[str, ModelFile]) -> None:
    """Write the inventory of the model: it is whole.

    Args:
        run: Run directory.
        names: Names of all files of the model.
        known: Files by name that need not be read again, because a record describes them.
    """
    files = [known.get(name) or describe(run.model / name) for name in sorted(names)]
    write_json(run.inventory, {"files": [file.to_json() for file in files]})


def seal(run: RunDirectory, shards: Mapping[str, ModelFile], names: Iterable[str], card: str) -> None:
    """Write the card, then the inventory: the model is whole.

    Args:
        run: Run directory.
        shards: Shards of the model by name, as their records have them.
        names: Names of the files beside the shards.
        card: Text of the card.
    """
    write_text(run.model / CARD_NAME, card)
    write_inventory(run, {*shards, *names, CARD_NAME}, shards)


def replace_card(run: RunDirectory, card: str) -> None:
    """Give a finished model another card.

    Args:
        run: Run directory.
        card: Text of the card.

    Raises:
        ConfigError: The model is not finished.
        DamagedError: The inventory cannot be read.
    """
    seal(run, {file.name: file for file in read_inventory(run) if file.name != CARD_NAME}, (), card)


def is_whole(run: RunDirectory, shards: Mapping[str, ModelFile]) -> bool:
    """Whether everything beside the shards is there as it was written, the figures of the run among it.

    Args:
        run: Run directory.
        shards: Shards of the model by name, which need not be looked at.
    """
    if not (run.summary.is_file() and run.inventory.is_file()):
        return False
    try:
        read_summary(run.summary)
        files = [file for file in read_inventory(run) if file.name not in shards]
    except DamagedError as error:
        run.journal.note("damaged", unit="model", reason=f"{error}; it is written again")
        return False
    paths = {file: run.model / file.name for file in files}
    return all(path.is_file() and describe(path) == file for file, path in paths.items())


def damaged_files(run: RunDirectory) -> list[str]:
    """Names of the files of the finished model that are gone or of another size than was written.

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


def read_inventory(run: RunDirectory) -> list[ModelFile]:
    """Read which files the finished model consists of.

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
        return [ModelFile.from_json(file) for file in content["files"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(run.inventory, f"it is incomplete ({error!r})") from error


def _shards(files: Iterable[FileRecord]) -> list[ModelFile]:
    paths = ((Path(file.name), file) for file in files)
    return [ModelFile(path.name, file.size_bytes, file.sha256) for path, file in paths if path.parent == Path("model")]
