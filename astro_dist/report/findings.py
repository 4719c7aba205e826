"""Everything that the directory of a run says of it, read once for the report."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Self

from astro.errors import ConfigError, DamagedError
from astro.quantization.layer_record import LayerRecord
from astro_dist.config.schema import RunConfig
from astro_dist.config.yaml_file import load_recorded_config
from astro_dist.report.status import Status, read_status
from astro_dist.run_directory.identity import Identity, read_identity
from astro_dist.run_directory.journal import Event, last_session
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.summary import Summary, read_summary
from astro_dist.run_directory.unit_record import BlockResult, LossResult, UnitRecord, WeightsResult
from astro_dist.schedule.names import block_of_unit, head_unit, round_stream

__all__ = ["Findings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """Holds what a run directory says. A run that goes on, or stopped, has only a part of it.

    Attributes:
        run: Run directory.
        identity: Identity of the run.
        status: What is done, in flight and left.
        config: Configuration of the run; None where this version cannot read it.
        summary: Figures of the finished run; None where it is not finished.
        records: Every record that can be read.
        events: Every event of the journal, the oldest first.
    """

    run: RunDirectory
    identity: Identity
    status: Status
    config: RunConfig | None
    summary: Summary | None
    records: Sequence[UnitRecord]
    events: Sequence[Event]

    @classmethod
    def read(cls, root: Path) -> Self:
        """Read a run directory.

        Args:
            root: Folder of the run directory.

        Raises:
            ConfigError: The folder holds no run.
        """
        identity = read_identity(root)
        run = RunDirectory(root, identity.key)
        return cls(
            run=run,
            identity=identity,
            status=read_status(root),
            config=_config(run),
            summary=_summary(run),
            records=tuple(run.readable_records()),
            events=tuple(run.journal.events()),
        )

    @property
    def name(self) -> str:
        """Return the name of the model: that on the Hub, or the last part of where it came from."""
        if self.summary is not None and self.summary.base_model.name:
            return self.summary.base_model.name
        return PurePath(self.config.model.source).name if self.config else self.run.root.name

    @property
    def session(self) -> Sequence[Event]:
        """Return the events of the last session."""
        return last_session(self.events)

    @property
    def rounds(self) -> dict[tuple[int, int], BlockResult]:
        """Return the figures of every block, by round and index of the block."""
        places = {block_of_unit(record.unit): record.result for record in self.records}
        blocks = {place: result for place, result in places.items() if place and isinstance(result, BlockResult)}
        return dict(sorted(blocks.items()))

    @property
    def blocks(self) -> dict[int, BlockResult]:
        """Return the figures of the blocks of the newest round, by index of the block."""
        rounds = self.rounds
        newest = max((number for number, _ in rounds), default=0)
        return {index: result for (number, index), result in rounds.items() if number == newest}

    @property
    def layers(self) -> list[LayerRecord]:
        """Return the records of the layers of the newest round."""
        return [layer for block in self.blocks.values() for layer in block.layers]

    @property
    def hidden_errors(self) -> dict[int, Sequence[float | None]]:
        """Return the relative errors of the hidden states behind each block, by round; none where not measured."""
        results = {record.unit: record.result for record in self.records}
        heads = {number: results.get(head_unit(round_stream(number))) for number in range(self.num_rounds)}
        measured = {number: head.hidden_errors for number, head in heads.items() if isinstance(head, LossResult)}
        return {number: errors for number, errors in measured.items() if errors}

    @property
    def num_rounds(self) -> int:
        """Return the number of rounds that have begun."""
        return max((number + 1 for number, _ in self.rounds), default=1)

    @property
    def effective_tokens(self) -> list[float]:
        """Return how many tokens of equal weight say as much as the weighted ones, for each measured input group."""
        results = (record.result for record in self.records)
        return [n for result in results if isinstance(result, WeightsResult) for n in result.effective_tokens.values()]

    @property
    def weights_by_width(self) -> Mapping[int, int]:
        """Return the number of quantized weights by their width in bits."""
        counts: dict[int, int] = {}
        for layer in self.layers:
            counts[layer.bits] = counts.get(layer.bits, 0) + layer.num_weights
        return dict(sorted(counts.items()))


def _config(run: RunDirectory) -> RunConfig | None:
    try:
        return load_recorded_config(run.config)
    except (ConfigError, DamagedError):
        return None


def _summary(run: RunDirectory) -> Summary | None:
    try:
        return read_summary(run.summary) if run.summary.is_file() else None
    except DamagedError:
        return None
