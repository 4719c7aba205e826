"""The shares of a block's Hessians: what workers sum of its inputs, each over a part of the calibration chunks.

In mode `sequential` the input groups of a block come in stages that follow its forward: the inputs of a stage already
hold the errors of the stages before. A share is a fixed part of the chunks.
"""

from astro.calibration.stage_statistics import StageStatistics
from astro.model.cache_scales import LargestByModule
from astro.timing import clock_s
from astro_dist.schedule.names import round_stream
from astro_dist.schedule.sequential import shares
from astro_dist.worker.batch_statistics import save_share
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.solved_stages import solved_before
from astro_dist.worker.split_block import BlockInParts
from astro_dist.worker.stage_inputs import StageInputs
from astro_dist.worker.summed_inputs import SummedInputs

__all__ = ["HessianShares"]

_RESULT = round_stream(0)
"""The stream through what the only round of mode `sequential` writes."""


class HessianShares:
    """Makes the shares of a block's Hessians."""

    def __init__(self, runner: BlockRunner, inputs: SummedInputs) -> None:
        """Begin with nothing.

        Args:
            runner: Runner of the worker's blocks.
            inputs: What is summed of the inputs of these blocks.
        """
        self._runner, self._inputs = runner, inputs

    def accumulate(self, block: BlockInParts, stage: int, share: int, start: float) -> None:
        """Sum the Hessians of a stage's batches over one share of the calibration chunks, and write the sums.

        Args:
            block: The block, laid out and loaded.
            stage: Index of the stage.
            share: Index of the share.
            start: Time at which the work on the share began, as `clock_s` has it.
        """
        runner = self._runner
        batches = block.stages[stage] if block.stages else []
        operands = {batch: self._inputs.operands(block, batch) for batch in batches}
        groups = [[operand] for of_batch in operands.values() for operand in of_batch]
        weights = self._inputs.token_weights(block)
        statistics = StageStatistics(groups, runner.device, weights, self._inputs.kind, in_halves=False)
        largest = LargestByModule()
        inputs = StageInputs(
            runner,
            block.unit,
            stream=_RESULT,
            start=_RESULT,
            earlier=solved_before(runner, block, stage),
            operands=statistics.operands,
            drifting=statistics.drifting,
            cache_scales=block.cache_scales if stage else {},
            largest=None if stage else largest,
        )
        statistics.add_all_(inputs.of(shares(runner.spec.chunks, runner.spec.shares)[share]))
        total_s, seconds = clock_s(runner.device) - start, statistics.seconds()
        seconds["forward"] = total_s - sum(seconds.values())
        for batch, of_batch in operands.items():
            sums = [statistics.take_(operand) for operand in of_batch]
            save_share(block, batch, share, sums, seconds if batch == batches[0] else {}, largest)
