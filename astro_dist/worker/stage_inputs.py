"""What the layers of a stage read of each calibration chunk: behind the quantized layers before, and in the source.

The inputs of a stage hold the errors of the stages before. Where weights are to make up for these, the chunk passes
the block once more with its original weights.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import zip_longest

from astro.calibration.block_statistics import inputs_of
from astro.model.block_call import BlockState
from astro.model.cache_scales import CacheScales, LargestByModule
from astro.model.operands import Inputs, Operand
from astro_dist.planning.units import BlockUnit
from astro_dist.schedule.names import ORIGINAL
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.solved_stages import SolvedLayers, put_in

__all__ = ["StageInputs"]


@dataclasses.dataclass(frozen=True)
class StageInputs:
    """Reads the inputs of one stage of a block of the source, which is loaded.

    Attributes:
        runner: Runner of the worker's blocks.
        unit: Unit of the block.
        stream: Stream through the result, which says how servers round.
        start: Stream in which chunks reach the block. It is `stream`, or that of the source, where errors of earlier
            blocks are not seen.
        earlier: The layers of the stages before, as they were solved.
        operands: First operand of each input group of the stage.
        drifting: Those of them whose inputs in the source are wanted too.
        cache_scales: Scales of an FP8 cache by the attention module's name in the model.
        largest: What grows by the keys and values of every chunk, in the first stage: the weights that make them are
            not quantized yet, and each chunk alone says how its keys and values round. None in later stages.
    """

    runner: BlockRunner
    unit: BlockUnit
    stream: str
    start: str
    earlier: SolvedLayers
    operands: Sequence[Operand]
    drifting: Sequence[Operand]
    cache_scales: Mapping[str, CacheScales]
    largest: LargestByModule | None = None

    def of(self, chunks: Sequence[str]) -> Iterator[tuple[str, Mapping[Operand, Inputs], Mapping[Operand, Inputs]]]:
        """Yield the name of each chunk, what operands read of it, and what those that drift read in the source.

        Args:
            chunks: Names of the chunks.
        """
        runner, index, apart = self.runner, self.unit.index, self.start != ORIGINAL
        # Experts lie in one parameter, so that they are copied whenever they are put in.
        always, at_times = (SolvedLayers(), self.earlier) if self.drifting else (self.earlier, SolvedLayers())
        with put_in(runner, self.unit, always):
            for chunk, following in zip_longest(chunks, chunks[1:]):
                later = (self.start, following) if following else None
                compared = (ORIGINAL, chunk) if self.drifting and apart else later
                state = runner.states.read(self.start, index, chunk, compared)
                with put_in(runner, self.unit, at_times):
                    inputs = self._read(chunk, state)
                source_inputs: Mapping[Operand, Inputs] = {}
                if self.drifting:
                    state = runner.states.read(ORIGINAL, index, chunk, later) if apart else state
                    forward = self._forward(chunk, state)
                    source_inputs = inputs_of(runner.layers(self.unit), list(self.drifting), forward)
                yield chunk, inputs, source_inputs

    def _read(self, chunk: str, state: BlockState) -> dict[Operand, Inputs]:
        """What operands read in the result, with the weights as they are now.

        Where all layers that make keys and values stay in 16 bits, the stage's own inputs may be behind attention.
        """
        runner, is_enough = self.runner, None
        with ExitStack() as stack:
            stack.enter_context(runner.rounding(self.stream, self.unit, is_whole=False))
            if self.largest is not None:
                is_enough = stack.enter_context(runner.cache.watching(self.unit.index, self.largest, rounds=True))
            else:
                stack.enter_context(runner.cache.rounding(self.cache_scales))
            return inputs_of(runner.layers(self.unit), list(self.operands), self._forward(chunk, state), is_enough)

    def _forward(self, chunk: str, state: BlockState) -> Callable[[], object]:
        return lambda: self.runner.forward(self.unit.index, state, chunk)
