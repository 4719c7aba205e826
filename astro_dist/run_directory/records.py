"""The records of a run: what is finished is a file in the run directory, its record written last.

While a run goes on, a file of its own directory that is missing or damaged is no wrong input: it is told, and what made
it is done again.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from astro.errors import CheckpointError, ConfigError, DamagedError
from astro.storage.atomic import PARTIAL_SUFFIX, read_json, sha256_of, write_json
from astro.storage.checked_tensors import load_part
from astro_dist.run_directory import lock
from astro_dist.run_directory.journal import Journal
from astro_dist.run_directory.layout import RunLayout
from astro_dist.run_directory.unit_record import BlockResult, FileRecord, UnitRecord, UnitResult
from astro_dist.schedule.names import any_share, block_of_unit, block_unit
from astro_dist.schedule.spent import Spent, SpentInputs, SpentParts, SpentShard, SpentShares

__all__ = ["RunDirectory", "read_own_json"]

Result = TypeVar("Result", bound=UnitResult)


def read_own_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that the run itself wrote.

    Args:
        path: File in the run directory.

    Raises:
        DamagedError: The file is missing, is no JSON, or holds no object.
    """
    if not path.is_file():
        raise DamagedError(path, "is missing")
    try:
        return read_json(path)
    except CheckpointError as error:
        raise DamagedError(path, str(error).removeprefix(f"{path}: ")) from error


@dataclasses.dataclass(frozen=True)
class RunDirectory(RunLayout):
    """Paths and records of one run.

    Attributes:
        key: Identity of the run; every record carries it.
    """

    key: str

    @property
    def journal(self) -> Journal:
        """The journal: what happened when."""
        return Journal(self.journal_file)

    def present(self, stream: str) -> dict[int, set[str]]:
        """The chunks that are there as input of each block.

        Folders are listed: asking for a file that another machine is yet to write would make a network file system
        remember that it is missing.

        Args:
            stream: Name of the model that the hidden states pass through.
        """
        folders = [*self.inputs(stream, 1).parent.glob("[0-9]*"), self.inputs(stream, 0)]
        return {int(folder.name): {path.stem for path in folder.glob("*.safetensors")} for folder in folders}

    def drop(self, spent: Spent) -> None:
        """Delete what nothing needs any more. Inputs of the first block serve every stream and stay."""
        match spent:
            case SpentInputs(block, stream) if block:
                shutil.rmtree(self.inputs(stream, block), ignore_errors=True)
            case SpentParts(round_index, block):
                shutil.rmtree(self.partial(round_index, block, "any").parent, ignore_errors=True)
            case SpentShares(block, batch):
                for path in self.partial(0, block, "any").parent.glob(any_share(batch)):
                    path.unlink(missing_ok=True)
            case SpentShard(round_index, block):
                self.drop_files(block_unit(round_index, block))

    def drop_files(self, unit: str) -> None:
        """Delete the files of a finished unit, as far as its record can be read; `drop_leftovers` takes the others.

        Args:
            unit: Name of the unit.
        """
        with contextlib.suppress(DamagedError):
            for file in self.files(unit):
                (self.root / file.name).unlink(missing_ok=True)

    def drop_leftovers(self) -> None:
        """Delete all inputs and what earlier rounds left: the run is complete."""
        for folder in self.leftovers:
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self, unit: str, files: Sequence[Path], result: UnitResult) -> UnitRecord:
        """Write a unit's record, after all of its files.

        Args:
            unit: Name of the unit.
            files: Paths that the unit wrote, inside the run directory.
            result: Figures of the unit.

        Returns:
            The record.
        """
        described = (
            FileRecord(str(path.relative_to(self.root)), path.stat().st_size, sha256_of(path)) for path in files
        )
        record = UnitRecord(unit, self.key, tuple(described), result)
        write_json(self.record(unit), record.to_json())
        return record

    def finished(self, unit: str, superseded: bool = False) -> UnitRecord | None:
        """The record of a unit, if the unit is finished and every file is as it was written.

        Damage goes to the journal: the unit is then redone.

        Args:
            unit: Name of the unit.
            superseded: Whether its files may be gone, because what needed them is finished.

        Raises:
            ConfigError: The record is of another run.
        """
        if not self.record(unit).is_file():
            return None
        try:
            record = self.read_record(unit)
        except DamagedError as error:
            self.journal.note("damaged", unit=unit, reason=f"record: {error}; the unit is redone")
            return None
        if record.key != self.key:
            raise ConfigError(f"{self.record(unit)}: belongs to another run; choose another output.dir")
        files = [file for file in record.files if not superseded or (self.root / file.name).exists()]
        damaged = next((file.name for file in files if not self._is_intact(file)), None)
        if damaged is None:
            return record
        reason = f"{damaged} is missing or differs from its checksum; the unit is redone"
        self.journal.note("damaged", unit=unit, reason=reason)
        return None

    def require_intact(self, unit: str) -> None:
        """Check the files of a finished unit before they are used.

        Args:
            unit: Name of the unit.

        Raises:
            DamagedError: The record or a file is missing, or not as it was written.
        """
        for file in self.files(unit):
            if not self._is_intact(file):
                raise DamagedError(self.root / file.name, "is missing, or its SHA-256 is not that of its record")

    def is_sound(self, path: Path) -> bool:
        """Whether a file of the run that could not be read elsewhere is as it was written.

        Args:
            path: File in the run directory. Records of other units that are damaged say nothing of it.
        """
        name = str(path.relative_to(self.root))
        described = [file for record in self.readable_records() for file in record.files if file.name == name]
        if described:
            return self._is_intact(described[0])
        try:
            if path.parent == self.records:
                self.read_record(path.stem)
            elif path == self.allocation:
                read_own_json(path)
            else:
                load_part(path)
        except DamagedError:
            return False
        return True

    def read_record(self, unit: str) -> UnitRecord:
        """Read the record of a finished unit.

        Args:
            unit: Name of the unit.

        Raises:
            DamagedError: The record is missing, or not as it was written.
        """
        path = self.record(unit)
        content = read_own_json(path)
        try:
            return UnitRecord.from_json(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"it is incomplete ({error!r})"
            raise DamagedError(path, reason) from error

    def read(self, unit: str, kind: type[Result]) -> Result:
        """Read the figures of a finished unit.

        Args:
            unit: Name of the unit.
            kind: Class of the figures.

        Raises:
            DamagedError: The record is missing, not as it was written, or holds other figures.
        """
        result = self.read_record(unit).result
        if not isinstance(result, kind):
            raise DamagedError(self.record(unit), f"holds no {kind.__name__}")
        return result

    def read_if_there(self, unit: str, kind: type[Result]) -> Result | None:
        """Read the figures of a unit that not every run has.

        Args:
            unit: Name of the unit.
            kind: Class of the figures.

        Returns:
            The figures; None where the run has no such unit.

        Raises:
            DamagedError: The record is not as it was written, or holds other figures.
        """
        return self.read(unit, kind) if self.record(unit).is_file() else None

    def recorded_units(self) -> list[str]:
        """Names of all units that have a record, whether it can be read or not."""
        return sorted(path.stem for path in self.records.glob("*.json"))

    def readable_records(self) -> Iterator[UnitRecord]:
        """Every record that is as it was written."""
        for unit in self.recorded_units():
            with contextlib.suppress(DamagedError):
                yield self.read_record(unit)

    def blocks(self) -> dict[tuple[int, int], BlockResult]:
        """Figures of every finished block by round and index of the block, as far as their records can be read."""
        results: dict[tuple[int, int], BlockResult] = {}
        for record in self.readable_records():
            place = block_of_unit(record.unit)
            if place is not None and isinstance(record.result, BlockResult):
                results[place] = record.result
        return dict(sorted(results.items()))

    def files(self, unit: str) -> tuple[FileRecord, ...]:
        """The files that a finished unit wrote.

        Args:
            unit: Name of the unit.

        Raises:
            DamagedError: The record is missing, or not as it was written.
        """
        return self.read_record(unit).files

    def has_files(self, unit: str) -> bool:
        """Whether everything that a finished unit wrote is still there.

        Args:
            unit: Name of the unit; a record that cannot be read counts as files that are gone.
        """
        try:
            return all((self.root / file.name).exists() for file in self.files(unit))
        except DamagedError:
            return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other drivers out for a while, and sweep up what a dead one left half written.

        Raises:
            ConfigError: The folder cannot be made or written.
            RunError: Another driver is at work here, or the file system fails.
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

    def _is_intact(self, file: FileRecord) -> bool:
        path = self.root / file.name
        try:
            return path.stat().st_size == file.size_bytes and sha256_of(path) == file.sha256
        except OSError:
            return False
