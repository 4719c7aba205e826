"""The shares of a block's Hessians: what workers sum of its inputs, each over a part of the calibration chunks.

In mode `sequential` the input groups of a block come in stages that follow its forward: the inputs of a stage already
hold the errors of the stages before. A share is a fixed part of the chunks.
"""

from collections.abc import Mapping, Sequence

from astro.calibration.input_sums import InputSums
from astro.model.cache_scales import LargestByModule
from astro.model.operands import Operand
from astro.timing import Stopwatch, clock_s
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
        sums = {
            batch: [self._inputs.empty(block, operand) for operand in self._inputs.operands(block, batch)]
            for batch in batches
        }
        by_operand = {
            operand: of_operand
            for batch in batches
            for operand, of_operand in zip(self._inputs.operands(block, batch), sums[batch], strict=True)
        }
        watches = {phase: Stopwatch(runner.device) for phase in ("hessian", "compensate")}
        chunks = shares(runner.spec.chunks, runner.spec.shares)[share]
        largest = self._feed(block, stage, chunks, by_operand, watches)
        total_s, seconds = clock_s(runner.device) - start, {phase: watch.read_s() for phase, watch in watches.items()}
        seconds["forward"] = total_s - sum(seconds.values())
        by_operand.clear()
        for batch in batches:
            save_share(block, batch, share, sums.pop(batch), seconds if batch == batches[0] else {}, largest)

    def _feed(
        self,
        block: BlockInParts,
        stage: int,
        chunks: Sequence[str],
        sums: Mapping[Operand, InputSums],
        watches: Mapping[str, Stopwatch],
    ) -> LargestByModule:
        """Pass chunks through the block up to a stage, those of the source too where the drift from it is wanted.

        Returns:
            The largest keys and values; of no module but in the first stage.
        """
        largest = LargestByModule()
        stage_inputs = StageInputs(
            self._runner,
            block.unit,
            stream=_RESULT,
            start=_RESULT,
            earlier=solved_before(self._runner, block, stage),
            operands=list(sums),
            drifting=[operand for operand, of_operand in sums.items() if of_operand.drift is not None],
            cache_scales=block.cache_scales if stage else {},
            largest=None if stage else largest,
        )
        weights = self._inputs.token_weights(block)
        for chunk, inputs, source_inputs in stage_inputs.of(chunks):
            for operand, of_operand in inputs.items():
                with watches["hessian"].running():
                    of_tokens = weights.of(operand, chunk, of_operand)
                    rounded = sums[operand].add_(of_operand.X, of_tokens)
                drift = sums[operand].drift
                if drift is not None:
                    with watches["compensate"].running():
                        drift.add_(source_inputs[operand].X, of_operand.X, of_tokens, rounded)
        return largest
