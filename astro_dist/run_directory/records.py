"""The run directory with its records. A unit is finished once its record is written, after all of its files.

A file of the run directory that is missing or damaged is not wrong input: the journal says so, and the unit that wrote
the file is done again.
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
        path: Path of the file, in the run directory.

    Raises:
        DamagedError: The file is missing, or is not a JSON object.
    """
    if not path.is_file():
        raise DamagedError(path, "is missing")
    try:
        return read_json(path)
    except CheckpointError as error:
        raise DamagedError(path, str(error).removeprefix(f"{path}: ")) from error


@dataclasses.dataclass(frozen=True)
class RunDirectory(RunLayout):
    """Knows the paths of one run, and reads, checks and writes its records.

    Attributes:
        key: Key of the run, which every record has; see `Identity`.
    """

    key: str

    @property
    def journal(self) -> Journal:
        """Return the journal, which says what happened when."""
        return Journal(self.journal_file)

    def present(self, stream: str) -> dict[int, set[str]]:
        """List the chunks that are there as input of each block.

        It lists folders, because a network file system that is asked for a file that another machine has still to
        write would remember that the file is missing.

        Args:
            stream: Name of the stream.

        Returns:
            The names of the chunks by index of the block.
        """
        folders = [*self.inputs(stream, 1).parent.glob("[0-9]*"), self.inputs(stream, 0)]
        return {int(folder.name): {path.stem for path in folder.glob("*.safetensors")} for folder in folders}

    def drop(self, spent: Spent) -> None:
        """Delete files that nothing needs any more. Inputs of the first block stay, because they serve every stream.

        Args:
            spent: Files to delete.
        """
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
        """Delete the files of a finished unit. Where its record cannot be read, `drop_leftovers` deletes them later.

        Args:
            unit: Name of the unit.
        """
        with contextlib.suppress(DamagedError):
            for file in self.files(unit):
                (self.root / file.name).unlink(missing_ok=True)

    def drop_leftovers(self) -> None:
        """Delete all inputs of blocks and all shards of earlier rounds, once the run is complete."""
        for folder in self.leftovers:
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self, unit: str, files: Sequence[Path], result: UnitResult) -> UnitRecord:
        """Write a unit's record, after all of its files.

        Args:
            unit: Name of the unit.
            files: Paths of the files that the unit wrote, in the run directory.
            result: Figures of the unit.

        Returns:
            The record.
        """
        entries = (FileRecord(str(path.relative_to(self.root)), path.stat().st_size, sha256_of(path)) for path in files)
        record = UnitRecord(unit, self.key, tuple(entries), result)
        write_json(self.record(unit), record.to_json())
        return record

    def finished(self, unit: str, superseded: bool = False) -> UnitRecord | None:
        """Read the record of a unit, and check the unit's files. Damage is noted in the journal.

        Args:
            unit: Name of the unit.
            superseded: Whether files of the unit may be gone, because everything that needed them is finished.

        Returns:
            The record; None where the unit is not finished or a file is not as it was written, so it has to be done.

        Raises:
            ConfigError: The record belongs to another run.
        """
        if not self.record(unit).is_file():
            return None
        try:
            record = self.read_record(unit)
        except DamagedError as error:
            self.journal.note("damaged", unit=unit, reason=f"record: {error}; the unit is redone")
            return None
        if record.key != self.key:
            raise ConfigError(f"{self.record(unit)}: belongs to another run; choose another directory with --output")
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
            DamagedError: The record or a file is missing, or is not as it was written.
        """
        for file in self.files(unit):
            if not self._is_intact(file):
                raise DamagedError(self.root / file.name, "is missing, or its SHA-256 is not that of its record")

    def is_sound(self, path: Path) -> bool:
        """Tell whether a file of the run, which a worker could not read, is as it was written.

        Args:
            path: Path of the file, in the run directory.
        """
        name = str(path.relative_to(self.root)) if path.is_relative_to(self.root) else ""
        entries = [file for record in self.readable_records() for file in record.files if file.name == name]
        if entries:
            return self._is_intact(entries[0])
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
            DamagedError: The record is missing, or is not as it was written.
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
            DamagedError: The record is missing, is not as it was written, or holds other figures.
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
        """Return the names of all units that have a record, whether it can be read or not."""
        return sorted(path.stem for path in self.records.glob("*.json"))

    def readable_records(self) -> Iterator[UnitRecord]:
        """Yield every record that is as it was written."""
        for unit in self.recorded_units():
            with contextlib.suppress(DamagedError):
                yield self.read_record(unit)

    def blocks(self) -> dict[tuple[int, int], BlockResult]:
        """Return the figures of every block whose record can be read, by round and index of the block."""
        results: dict[tuple[int, int], BlockResult] = {}
        for record in self.readable_records():
            place = block_of_unit(record.unit)
            if place is not None and isinstance(record.result, BlockResult):
                results[place] = record.result
        return dict(sorted(results.items()))

    def files(self, unit: str) -> tuple[FileRecord, ...]:
        """Return the files that a finished unit wrote.

        Args:
            unit: Name of the unit.

        Raises:
            DamagedError: The record is missing, or is not as it was written.
        """
        return self.read_record(unit).files

    def has_files(self, unit: str) -> bool:
        """Tell whether every file that a finished unit wrote is still there. It is not if the record cannot be read.

        Args:
            unit: Name of the unit.
        """
        try:
            return all((self.root / file.name).exists() for file in self.files(unit))
        except DamagedError:
            return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other drivers out for a while, and delete files that a dead one left half written.

        Raises:
            ConfigError: The folder cannot be made or written.
            RunError: Another driver works on the run, or the file system fails.
        """
        with lock.hold(self.root):
            self._sweep()
            self.journal.note("opened")
            try:
                yield
            finally:
                self._sweep()

    def is_locked(self) -> bool:
        """Tell whether a driver works on the run."""
        return lock.is_held(self.root)

    def _sweep(self) -> None:
        """Delete files that were left half written."""
        for folder in (self.root, *([self.local] if self.local else [])):
            for partial in folder.rglob(f".*{PARTIAL_SUFFIX}"):
                partial.unlink(missing_ok=True)

    def _is_intact(self, file: FileRecord) -> bool:
        path = self.root / file.name
        try:
            return path.stat().st_size == file.size_bytes and sha256_of(path) == file.sha256
        except OSError:
            return False
