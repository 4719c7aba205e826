"""The tuning of a solved block's scales by what the block as a whole returns, before it is written."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from astro.model.block_call import BlockCall, BlockState, forward
from astro.quantization.scale_tuning import TuningText, tune_scales
from astro.timing import timed
from astro_dist.planning.units import BlockUnit
from astro_dist.run_directory.tuning import Tuning
from astro_dist.schedule.names import ORIGINAL, round_stream, stream_names
from astro_dist.worker.block_recipe import block_recipe
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.solved_block import SolvedBlock
from astro_dist.worker.solved_stages import SolvedLayers, put_in
from astro_dist.worker.token_weigher import read_token_weights

__all__ = ["SINGLE", "tune_block"]

SINGLE = ("single-0", "single-1")
"""Names under which it is recorded what blocks are called with for one sequence, and for another one."""


def tune_block(runner: BlockRunner, round_index: int, unit: BlockUnit, solved: SolvedBlock) -> SolvedBlock:
    """Tune the scales of a solved block, if the configuration asks for it and the round is the last.

    What is wanted of the quantized block is what the original block returns for the same inputs.

    Args:
        runner: Runner of the worker's blocks; it holds the original block afterwards.
        round_index: Index of the round.
        unit: Unit of the block.
        solved: The block.

    Returns:
        The block with tuned scales; as it was where nothing is tuned.

    Raises:
        DamagedError: A file that another call wrote is missing, or not as it was written.
    """
    spec = runner.spec
    steps = spec.quantization.tune_steps
    if not steps or not solved.layers or round_index + 1 < spec.run.rounds:
        return solved
    seconds: dict[str, float] = {}
    with timed(seconds, "tune", runner.device):
        inputs = round_stream(0) if spec.is_sequential else stream_names(spec.run.rounds)[round_index]
        runner.load(ORIGINAL, unit.index)
        texts = _TuningTexts(runner, unit, inputs, round_stream(round_index)).first(steps)
        weights = {name: layer.dequantize(spec.compute_dtype) for name, layer in solved.layers.items()}
        corrections = {name: layer.correction for name, layer in solved.layers.items() if layer.correction}
        with put_in(runner, unit, SolvedLayers(weights, corrections)):
            scale_dtype = block_recipe(spec, unit).scale_dtype
            tuned = tune_scales(runner.layers(unit), solved.layers, texts, steps, scale_dtype)
    tuning = Tuning(steps=steps, before=tuned.error_before, after=tuned.error_after, reason=tuned.reason)
    return dataclasses.replace(solved, layers=tuned.layers, seconds={**solved.seconds, **seconds}, tuning=tuning)


class _TuningTexts:
    """Makes the texts that a block is tuned on from its calibration chunks, if possible one of each sequence."""

    def __init__(self, runner: BlockRunner, unit: BlockUnit, inputs: str, result: str) -> None:
        """Look at a block.

        Args:
            runner: Runner of the worker's blocks, which holds the original block now.
            unit: Unit of the block.
            inputs: Stream whose hidden states are the block's inputs.
            result: Stream through the quantized block, in which the inputs of its layers may be rounded.
        """
        self._runner, self._unit, self._inputs, self._result = runner, unit, inputs, result
        self._weights = read_token_weights(runner, unit)

    def first(self, count: int) -> list[TuningText]:
        """Return so many texts, or all where there are fewer. What they hold is kept: every step would read it again.

        Args:
            count: Number of texts.
        """
        texts: list[TuningText] = []
        for chunk in self._runner.spec.calibration_chunks:
            texts += self._of_chunk(chunk)
            if len(texts) >= count:
                break
        return texts[:count]

    def _of_chunk(self, chunk: str) -> list[TuningText]:
        runner, index = self._runner, self._unit.index
        state = runner.states.read(self._inputs, index, chunk)
        wanted = runner.forward(index, state, chunk).hidden
        weights = self._weights.of_output(chunk, wanted)
        num_sequences, length = runner.tokens.shape(chunk)
        single = torch.Size((1, length))
        if not _is_separable(state, runner.calls.recording(single).different):
            call = runner.calls.call(index, chunk, runner.tokens.shape(chunk))
            return [TuningText(self._output(state, call), wanted, weights)]
        call = runner.calls.call(index, SINGLE[0], single)
        return [
            TuningText(self._output(part, call), wanted[i : i + 1], weights[i * length : (i + 1) * length])
            for i, part in ((i, _sequence(state, i)) for i in range(num_sequences))
        ]

    def _output(self, state: BlockState, call: BlockCall) -> Callable[[], torch.Tensor]:
        """A forward of the block as it is loaded then."""
        runner, block = self._runner, self._runner.skeleton.blocks[self._unit.index]

        def output() -> torch.Tensor:
            with runner.rounding(self._result, self._unit):
                return forward(block, state, call).hidden

        return output


def _is_separable(state: BlockState, different: Sequence[str]) -> bool:
    """Tell whether the sequences of a chunk can pass a block one by one.

    They cannot where the block is called with something that depends on the text, which is kept for whole chunks.

    Args:
        state: State of the chunk before the block.
        different: Names of single sequences with which blocks are called otherwise than with another one.
    """
    return not different and all(len(other) == len(state.hidden) for other in state.others.values())


def _sequence(state: BlockState, index: int) -> BlockState:
    one = slice(index, index + 1)
    return BlockState(state.hidden[one], {name: other[one] for name, other in state.others.items()})
