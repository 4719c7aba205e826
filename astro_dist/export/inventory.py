"""What a finished model consists of: every file with its size and SHA-256, written last, when the model is whole."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from astro.errors import ConfigError
from astro.storage.atomic import read_json, sha256_of, write_json, write_text
from astro_dist.run_directory.records import RunDirectory

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
        name: in the model's folder.
        size_bytes: of it.
        sha256: of its bytes, hex.
    """

    name: str
    size_bytes: int
    sha256: str


def describe(path: Path) -> ModelFile:
    """A file as it is now."""
    return ModelFile(path.name, path.stat().st_size, sha256_of(path))


def shards_of(run: RunDirectory, unit: str) -> list[ModelFile]:
    """The final files of the model that a finished unit wrote, by its record; none of an earlier round's unit."""
    files = ((Path(file["name"]), file) for file in run.files(unit))
    return [_entry(path.name, file) for path, file in files if path.parent == Path("model")]


def all_shards(run: RunDirectory) -> dict[str, ModelFile]:
    """Every shard of the model by name, by the records of a run whose units are finished."""
    units = [path.stem for path in sorted((run.root / "records").glob("*.json"))]
    return {file.name: file for unit in units for file in shards_of(run, unit)}


def write_inventory(run: RunDirectory, names: Iterable[str], known: Mapping[str, ModelFile]) -> None:
    """Write the inventory of the model: it is whole.

    Args:
        run: the run directory.
        names: of every file of the model.
        known: those that need not be read again, because a record describes them.
    """
    files = [known.get(name) or describe(run.model / name) for name in sorted(names)]
    write_json(run.inventory, {"files": [dataclasses.asdict(file) for file in files]})


def seal(run: RunDirectory, shards: Mapping[str, ModelFile], names: Iterable[str], card: str) -> None:
    """Write the card, then the inventory: the model is whole.

    Args:
        run: the run directory.
        shards: of the model, by name, as their records have them.
        names: of the files beside them.
        card: as it shall read.
    """
    write_text(run.model / CARD_NAME, card)
    write_inventory(run, {*shards, *names, CARD_NAME}, shards)


def replace_card(run: RunDirectory, card: str) -> None:
    """Give a finished model another card.

    Raises:
        ConfigError: the model is not finished.
    """
    seal(run, {file.name: file for file in read_inventory(run) if file.name != CARD_NAME}, (), card)


def is_whole(run: RunDirectory, shards: Mapping[str, ModelFile]) -> bool:
    """Whether everything beside the shards is there as it was written.

    Args:
        run: the run directory.
        shards: of the model, by name, that need not be looked at.
    """
    if not (run.summary.is_file() and run.inventory.is_file()):
        return False
    files = [file for file in read_inventory(run) if file.name not in shards]
    paths = {file: run.model / file.name for file in files}
    return all(path.is_file() and describe(path) == file for file, path in paths.items())


def damaged_files(run: RunDirectory) -> list[str]:
    """Files of the finished model that are gone or of another size than was written.

    Raises:
        ConfigError: the model is not finished.
    """
    paths = {file: run.model / file.name for file in read_inventory(run)}
    return [
        file.name for file, path in paths.items() if not (path.is_file() and path.stat().st_size == file.size_bytes)
    ]


def read_inventory(run: RunDirectory) -> list[ModelFile]:
    """Every file of the finished model.

    Raises:
        ConfigError: the model is not finished.
    """
    if not run.inventory.is_file():
        raise ConfigError(
            f"{run.root}: its model is not finished, {run.inventory.name} is missing; run `astro-dist quantize` first"
        )
    return [_entry(file["name"], file) for file in read_json(run.inventory)["files"]]


def _entry(name: str, file: Mapping[str, Any]) -> ModelFile:
    return ModelFile(name, int(file["size_bytes"]), str(file["sha256"]))
