"""The tuning of a solved block's scales by what the block as a whole returns, before it is written."""

import dataclasses
from collections.abc import Callable, Mapping

import torch

from astro.model.block_call import BlockCall, BlockState, forward
from astro.model.cache_scales import CacheScales
from astro.model.low_rank import attached
from astro.quantization.scale_tuning import TuningText, tune_scales
from astro.timing import timed
from astro_dist.planning.units import BlockUnit
from astro_dist.run_directory.tuning import Tuning
from astro_dist.schedule.names import ORIGINAL, round_stream, stream_names
from astro_dist.worker.block_recipe import block_recipe
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.solved_block import SolvedBlock
from astro_dist.worker.token_weigher import read_token_weights

__all__ = ["tune_block"]


def tune_block(runner: BlockRunner, round_index: int, unit: BlockUnit, solved: SolvedBlock) -> SolvedBlock:
    """Tune the scales of a solved block, if the configuration asks for it and the round is the last.

    What is wanted of the quantized block is what the original block returns for the same inputs; or for those in the
    source, where weights make up for the errors of earlier blocks. Else tuning would undo what they make up for.

    Args:
        runner: Runner of the worker's blocks; it holds none afterwards, if the scales were to be tuned.
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
        layers = {name: layer.to(runner.device) for name, layer in solved.layers.items()}
        corrections = {name: layer.correction for name, layer in layers.items() if layer.correction}
        try:
            runner.load(ORIGINAL, unit.index)
            texts = _TuningTexts(runner, round_index, unit, solved.cache_scales).first(steps)
            with attached(runner.skeleton.model, corrections, spec.compute_dtype):
                scale_dtype = block_recipe(spec, unit).scale_dtype
                tuned = tune_scales(runner.layers(unit), layers, texts, steps, scale_dtype)
        finally:
            runner.close()  # its weights are not the original ones any more
    tuning = Tuning(steps=steps, before=tuned.error_before, after=tuned.error_after, reason=tuned.reason)
    return dataclasses.replace(solved, layers=tuned.layers, seconds={**solved.seconds, **seconds}, tuning=tuning)


class _TuningTexts:
    """Makes the texts that a block is tuned on from its calibration chunks, if possible one of each sequence."""

    def __init__(
        self, runner: BlockRunner, round_index: int, unit: BlockUnit, cache_scales: Mapping[str, CacheScales]
    ) -> None:
        """Look at a block.

        Args:
            runner: Runner of the worker's blocks, which holds the original block now.
            round_index: Index of the round, which is the last.
            unit: Unit of the block.
            cache_scales: Scales of an FP8 cache by the attention module's name in the model.
        """
        self._runner, self._unit, self._cache_scales = runner, unit, cache_scales
        self._result = round_stream(round_index)
        self._inputs = self._result if runner.spec.is_sequential else stream_names(runner.spec.run.rounds)[round_index]
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
        runner, index, shape = self._runner, self._unit.index, self._runner.tokens.shape(chunk)
        wanted_for = ORIGINAL if runner.spec.is_sequential and runner.spec.quantization.compensates else self._inputs
        wanted = runner.forward(index, runner.states.read(wanted_for, index, chunk), chunk).hidden
        state = runner.states.read(self._inputs, index, chunk)
        weights = self._weights.of_output(chunk, wanted)
        calls = runner.calls.of_sequences(index, chunk, shape)
        if calls is None or any(len(other) != len(state.hidden) for other in state.others.values()):
            return [TuningText(self._output(state, runner.calls.call(index, chunk, shape)), wanted, weights)]
        pieces = zip(calls, wanted.split(1), weights.split(shape[1]), strict=True)
        return [
            TuningText(self._output(_sequence(state, number), call), *piece)
            for number, (call, *piece) in enumerate(pieces)
        ]

    def _output(self, state: BlockState, call: BlockCall) -> Callable[[], torch.Tensor]:
        """A forward of the block as it is loaded then."""
        runner, block = self._runner, self._runner.skeleton.blocks[self._unit.index]

        def output() -> torch.Tensor:
            with runner.serving(self._result, self._unit, self._cache_scales):
                return forward(block, state, call).hidden

        return output


def _sequence(state: BlockState, index: int) -> BlockState:
    one = slice(index, index + 1)
    return BlockState(state.hidden[one], {name: other[one] for name, other in state.others.items()})
