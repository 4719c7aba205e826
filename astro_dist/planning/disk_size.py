"""What the folder of a run takes on the disk, from headers and configuration alone."""

from collections.abc import Iterable

from astro_dist.planning.correction_cost import correction_size
from astro_dist.planning.planned_run import PlannedRun
from astro_dist.planning.predicted_groups import PredictedInputGroup, block_batches, stages_of
from astro_dist.planning.statistics_cost import StatisticsCost
from astro_dist.planning.units import BlockUnit
from astro_dist.schedule.names import is_held_out
from astro_dist.schedule.sequential import shares

__all__ = ["DiskSize"]

_TILE_BYTES = 1.1
"""Bytes of a weight in the file of a tile: a byte, and a little more for scales."""


class DiskSize:
    """Tells what the run directory holds at most."""

    def __init__(self, planned: PlannedRun) -> None:
        """Look at a run.

        Args:
            planned: The run.
        """
        self._plan, self._config = planned.plan, planned.config
        self._tokens, self._itemsize = planned.chunk_tokens, planned.dtype.itemsize
        self._statistics = StatisticsCost(planned.config, planned.dtype, planned.device_type)
        self._tile_elements = planned.config.execution.tile_elements(planned.device_type)
        self._mode = planned.config.execution.mode
        self._is_sequential = self._mode == "sequential"

    def most_bytes(self, workers: int) -> int:
        """Return what the run directory holds at most, in bytes.

        It holds the result, an earlier round, the inputs of the blocks in flight, and in mode `sequential` the parts of
        one block. Where the loss weighs tokens or inputs are smoothed, it holds the calibration inputs of all blocks
        for a while, and the gradients of those in flight.

        Args:
            workers: Number of workers.
        """
        blocks, square_bytes = self._plan.blocks, self._statistics.square_bytes
        is_passed_before = (
            self._config.calibration.token_weights == "loss" or self._config.activations.smoothing != "none"
        )
        inputs = self._activations(self._tokens)
        calibration = self._activations(chunk for chunk in self._tokens if not is_held_out(chunk))
        kept = (len(blocks) + workers + 2) * calibration * is_passed_before
        largest = max(map(self._batches, blocks), key=_total_square)
        if not self._is_sequential:
            num_split = min(workers // 2, len(blocks)) if self._mode == "blocks" else 0
            squares = num_split * sum(square_bytes * batch.square for batch in largest)
            in_flight = (workers + 2) * self._config.execution.rounds * inputs
            return int(self.kept_bytes() + kept + in_flight + squares)
        squares = square_bytes * (_total_square(largest) + self._widest(largest))
        tiles = sum(_TILE_BYTES * batch.weights for batch in largest)
        in_flight = (4 + 3 * self._statistics.is_compensated) * inputs
        return int(self.kept_bytes() + kept + in_flight + squares + tiles)

    def kept_bytes(self) -> int:
        """Return how much of `most_bytes` are no activations: the result, and an earlier round.

        Corrections are there twice at the end, block by block and as one adapter.
        """
        corrections = correction_size(self._plan.blocks, self._config.reconstruction).size_bytes
        rounds = min(self._config.execution.rounds, 2)
        return self._plan.written_bytes * (1 if self._is_sequential else rounds) + corrections * (rounds + 1)

    def _widest(self, batches: list[PredictedInputGroup]) -> float:
        """Elements of all shares of the stage with the largest Hessians."""
        num_shares = len(shares(list(self._tokens), self._config.execution.hessian_shares))
        return float(num_shares * max(sum(batches[i].square for i in stage) for stage in stages_of(batches)))

    def _batches(self, unit: BlockUnit) -> list[PredictedInputGroup]:
        return block_batches(unit.linears, self._plan.expert_share, self._tile_elements)

    def _activations(self, chunks: Iterable[str]) -> float:
        return float(sum(self._tokens[chunk] for chunk in chunks) * self._plan.hidden_size * self._itemsize)


def _total_square(batches: Iterable[PredictedInputGroup]) -> float:
    return sum(batch.square for batch in batches)
