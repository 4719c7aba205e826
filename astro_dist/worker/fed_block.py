"""A block that a worker feeds with chunks, until it is solved, split or evaluated."""

import dataclasses

from astro.calibration.block_statistics import BlockStatistics
from astro.model.cache_scales import LargestByModule
from astro.model.operands import names_of
from astro_dist.planning.units import BlockUnit

__all__ = ["FedBlock"]


@dataclasses.dataclass(frozen=True)
class FedBlock:
    """A block that chunks pass through, and what was gathered for it.

    Attributes:
        round_index: Index of the round; of the pass after the last round, the number of rounds.
        unit: Unit of the block.
        statistics: Statistics of the layers' inputs, to which every calibration chunk adds; None where the block is
            solved stage by stage, each of which gathers its own.
        seconds: Time by phase, to which every call adds; `forward` holds the time of the statistics too.
        largest: Largest keys and values, to which every calibration chunk adds; no module is in it where servers do
            not round them, or where the block is solved stage by stage.
    """

    round_index: int
    unit: BlockUnit
    statistics: BlockStatistics | None
    seconds: dict[str, float]
    largest: LargestByModule = dataclasses.field(default_factory=LargestByModule)

    @property
    def place(self) -> tuple[int, int]:
        """The round and the block."""
        return self.round_index, self.unit.index

    @property
    def input_groups(self) -> list[list[str]]:
        """The names of the layers of each input group."""
        assert self.statistics is not None
        return [names_of(operands) for operands in self.statistics.input_groups]

    def feeding_seconds(self) -> dict[str, float]:
        """Return the time by phase until all chunks have passed, that of the Hessians apart."""
        if self.statistics is None:
            return dict(self.seconds)
        hessian_s = self.statistics.stopwatch.read_s()
        return {**self.seconds, "forward": self.seconds["forward"] - hessian_s, "hessian": hessian_s}
