"""The run directory: what is finished is a file there, its record written last.

config.yaml    the resolved configuration        records/       one record a finished unit
run.json       identity of the run               activations/   only what unfinished blocks need
model/         the checkpoint, shard by shard    tokens.safetensors   every chunk's tokens
summary.json   the figures of the run            journal.jsonl  what happened when
rounds/        shards of earlier rounds          allocation.json  with a width budget: every layer's width
model.json     files of the finished model       uploads.json   what the Hub holds of it
source/        of a remote model: config, tokenizer, code
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astro.errors import CheckpointError, ConfigError, DamagedError
from astro.storage.atomic import PARTIAL_SUFFIX, read_json, sha256_of, write_bytes, write_json, write_text
from astro.storage.checked_tensors import load_part, save_part
from astro_dist.config.schema import RunConfig
from astro_dist.run_directory import lock
from astro_dist.run_directory.identity import MARK, difference
from astro_dist.run_directory.journal import Journal
from astro_dist.schedule.calls import Spent, SpentInputs, SpentParts, SpentShard, SpentShares
from astro_dist.schedule.names import any_share, block_unit

if TYPE_CHECKING:
    import torch

__all__ = ["RunDirectory"]


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Paths and records of one run.

    Attributes:
        root: the run directory.
        key: identity of the run; every record carries it.
        rounds: passes over the model; the last one's shards are the model.
    """

    root: Path
    key: str
    rounds: int = 1

    @property
    def model(self) -> Path:
        """Folder of the result."""
        return self.root / "model"

    @property
    def tokens(self) -> Path:
        """File of every chunk's tokens."""
        return self.root / "tokens.safetensors"

    @property
    def summary(self) -> Path:
        """Figures of the finished run."""
        return self.root / "summary.json"

    @property
    def inventory(self) -> Path:
        """Every file of the finished model, see `inventory.py`."""
        return self.root / "model.json"

    @property
    def uploads(self) -> Path:
        """What the Hub holds of the model."""
        return self.root / "uploads.json"

    @property
    def journal(self) -> Journal:
        """What happened when."""
        return Journal(self.root / "journal.jsonl")

    @property
    def allocation(self) -> Path:
        """Width of every layer, where the run chose them."""
        return self.root / "allocation.json"

    def shard(self, round_index: int, file: str) -> Path:
        """A block's shard of a round; those of the last round are the model's own files."""
        return (self.model if round_index == self.rounds - 1 else self.root / "rounds" / str(round_index)) / file

    def hidden(self, stream: str, block: int, chunk: str) -> Path:
        """Input of a block for one chunk on its way through a model; before the first block all streams are one."""
        return self._inputs(stream, block) / f"{chunk}.safetensors"

    def partial(self, round_index: int, block: int, name: str) -> Path:
        """A part of a block's solve that workers hand each other."""
        return self.root / "activations" / "parts" / f"{round_index}-{block:04d}" / f"{name}.safetensors"

    def present(self, stream: str) -> dict[int, set[str]]:
        """Chunks that are there as input of each block. Lists folders: asking for a file that another machine is yet
        to write would make a network file system remember that it is missing.
        """
        folders = [*(self.root / "activations" / stream).glob("[0-9]*"), self._inputs(stream, 0)]
        return {int(folder.name): {path.stem for path in folder.glob("*.safetensors")} for folder in folders}

    def calls(self, batch: int, length: int) -> Path:
        """Arguments of every block for chunks of this shape."""
        return self.root / "activations" / f"calls-{batch}x{length}.safetensors"

    def drop(self, spent: Spent) -> None:
        """Delete what nothing needs any more. Inputs of the first block serve every stream and stay."""
        match spent:
            case SpentInputs(block, stream) if block:
                shutil.rmtree(self._inputs(stream, block), ignore_errors=True)
            case SpentParts(round_index, block):
                shutil.rmtree(self.partial(round_index, block, "any").parent, ignore_errors=True)
            case SpentShares(block, batch):
                for path in self.partial(0, block, "any").parent.glob(any_share(batch)):
                    path.unlink(missing_ok=True)
            case SpentShard(round_index, block):
                for file in self.files(block_unit(round_index, block)):
                    (self.root / file["name"]).unlink(missing_ok=True)

    def drop_leftovers(self) -> None:
        """Forget all inputs and what earlier rounds left: the run is complete."""
        for name in ("activations", "rounds"):
            shutil.rmtree(self.root / name, ignore_errors=True)

    def finish(self, unit: str, files: list[Path], result: dict[str, Any]) -> dict[str, Any]:
        """Write a unit's record, after all of its files.

        Args:
            unit: name.
            files: that it wrote, inside the run directory.
            result: its figures.

        Returns:
            The record.
        """
        described = [
            {"name": str(path.relative_to(self.root)), "size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in files
        ]
        record = {"unit": unit, "key": self.key, "files": described, "result": result}
        write_json(self._record(unit), {**record, "checksum": _checksum(record)})
        return record

    def finished(self, unit: str, superseded: bool = False) -> dict[str, Any] | None:
        """A unit's record, if it is finished and every file is as it was written.

        Args:
            unit: name.
            superseded: whether its files may be gone, because what needed them is finished.

        Raises:
            ConfigError: the record is of another run.
        """
        path = self._record(unit)
        if not path.is_file():
            return None
        try:
            record = read_json(path)
            if record.pop("checksum") != _checksum(record):
                raise CheckpointError(f"{path}: its checksum is wrong")
        except (CheckpointError, KeyError) as error:
            self.journal.note("damaged", unit=unit, reason=f"record: {error}; the unit is redone")
            return None
        if record["key"] != self.key:
            raise ConfigError(f"{path}: belongs to another run; choose another output.dir")
        files = [file for file in record["files"] if not superseded or (self.root / file["name"]).exists()]
        damaged = next((file["name"] for file in files if not self._is_intact(file)), None)
        if damaged is None:
            return record
        reason = f"{damaged} is missing or differs from its checksum; the unit is redone"
        self.journal.note("damaged", unit=unit, reason=reason)
        return None

    def require_intact(self, unit: str) -> None:
        """Check the files of a finished unit before they are used.

        Raises:
            DamagedError: one is missing, or not as it was written.
        """
        for file in self.files(unit):
            if not self._is_intact(file):
                raise DamagedError(self.root / file["name"], "is missing, or its SHA-256 is not that of its record")

    def is_sound(self, path: Path) -> bool:
        """Whether a file of the run that could not be read elsewhere is as it was written."""
        name = str(path.relative_to(self.root))
        records = [read_json(record) for record in (self.root / "records").glob("*.json")]
        described = [file for record in records for file in record["files"] if file["name"] == name]
        if described:
            return self._is_intact(described[0])
        try:
            if path == self.allocation:
                read_json(path)
            else:
                load_part(path)
        except (CheckpointError, DamagedError):
            return False
        return True

    def files(self, unit: str) -> list[dict[str, Any]]:
        """Name under the run directory, `size_bytes` and `sha256` of every file that a finished unit wrote."""
        files: list[dict[str, Any]] = read_json(self._record(unit))["files"]
        return files

    def has_files(self, unit: str) -> bool:
        """Whether everything that a finished unit wrote is still there."""
        return all((self.root / file["name"]).exists() for file in self.files(unit))

    def read(self, unit: str) -> dict[str, Any]:
        """A finished unit's figures; empty where the run has no such unit."""
        path = self._record(unit)
        result: dict[str, Any] = read_json(path)["result"] if path.is_file() else {}
        return result

    def begun(self, config: RunConfig, identity: dict[str, Any]) -> bool:
        """Whether this run was begun here before. One that came to nothing, be it another, counts for nothing.

        Args:
            config: of the run.
            identity: what else belongs to the run: fingerprints, version.

        Raises:
            ConfigError: the directory holds another run, or files that are none.
        """
        mark = self.root / MARK
        # What a run writes before its first unit, it may leave behind when it ends there.
        own = {mark.name, "config.yaml", "lock", self.journal.path.name, self.tokens.name}
        paths = list(self.root.iterdir()) if self.root.is_dir() else []
        others = [path for path in paths if path.name not in own and path.suffix != PARTIAL_SUFFIX]
        if mark.is_file() and others:
            found = read_json(mark)
            if found.get("key") != self.key or found.get("tokens_sha256") != identity["tokens_sha256"]:
                raise ConfigError(
                    f"{self.root}: holds another run ({difference(config, identity, found)}); "
                    "choose another output.dir, or remove this one if it is not wanted. Only the version that began a "
                    "run can go on with it; a finished one can be verified and published by any"
                )
            return True
        if others or (self.root.exists() and not self.root.is_dir()):
            raise ConfigError(f"{self.root}: exists and is not a run directory; choose another output.dir")
        return False

    def begin(self, config: RunConfig, identity: dict[str, Any], tokens: "dict[str, torch.Tensor]") -> None:
        """Make the directory this run's; its mark comes last.

        Args:
            config: of the run.
            identity: what else belongs to the run.
            tokens: of every chunk, int64 [B, T].
        """
        write_text(self.root / "config.yaml", config.to_yaml())
        save_part(self.tokens, tokens)
        write_json(self.root / MARK, {"key": self.key, **identity, "arithmetic": config.arithmetic()})

    def keep_side_files(self, folder: Path) -> Path:
        """A copy of a remote source's small files that every node sees."""
        for path in folder.iterdir():
            if path.is_file() and not path.name.endswith(PARTIAL_SUFFIX):
                write_bytes(self.root / "source" / path.name, path.read_bytes())
        return self.root / "source"

    def mend_tokens(self, tokens: "dict[str, torch.Tensor]") -> None:
        """Write the tokens again where their file is missing or damaged. They are part of the run's identity."""
        try:
            load_part(self.tokens)
        except DamagedError as error:
            self.journal.note("damaged", unit="tokens", reason=str(error))
            save_part(self.tokens, tokens)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other drivers out for a while, and sweep up what a dead one left half written.

        Raises:
            ConfigError: the folder cannot be made or written.
            RunError: another driver is at work here, or the file system fails.
        """
        with lock.held(self.root):
            self._sweep()
            self.journal.note("opened")
            try:
                yield
            finally:
                self._sweep()

    def is_locked(self) -> bool:
        """Whether a driver is at work here."""
        return lock.is_held(self.root)

    def _sweep(self) -> None:
        """Delete what was left half written."""
        for partial in self.root.rglob(f".*{PARTIAL_SUFFIX}"):
            partial.unlink(missing_ok=True)

    def _inputs(self, stream: str, block: int) -> Path:
        return self.root / "activations" / (stream if block else "embedded") / f"{block:04d}"

    def _record(self, unit: str) -> Path:
        return self.root / "records" / f"{unit}.json"

    def _is_intact(self, file: dict[str, Any]) -> bool:
        path = self.root / file["name"]
        try:
            return bool(path.stat().st_size == file["size_bytes"] and sha256_of(path) == file["sha256"])
        except OSError:
            return False


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
