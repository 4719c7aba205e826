"""The tuning of a solved block's scales by what the block as a whole returns, before it is written."""

import dataclasses

import torch

from astro.quantization.scale_tuning import TuningText, tune_scales
from astro.timing import timed
from astro_dist.planning.tuning_cost import tuned_chunks
from astro_dist.planning.units import BlockUnit
from astro_dist.run_directory.tuning import Tuning
from astro_dist.schedule.names import ORIGINAL, round_stream, stream_names
from astro_dist.worker.block_recipe import block_recipe
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.solved_block import SolvedBlock
from astro_dist.worker.solved_stages import SolvedLayers, put_in
from astro_dist.worker.token_weigher import read_token_weights

__all__ = ["tune_block"]


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
        texts = _texts(runner, inputs, round_stream(round_index), unit)
        weights = {name: layer.dequantize(spec.compute_dtype) for name, layer in solved.layers.items()}
        corrections = {name: layer.correction for name, layer in solved.layers.items() if layer.correction}
        with put_in(runner, unit, SolvedLayers(weights, corrections)):
            scale_dtype = block_recipe(spec, unit).scale_dtype
            tuned = tune_scales(runner.layers(unit), solved.layers, texts, steps, scale_dtype)
    tuning = Tuning(steps=steps, before=tuned.error_before, after=tuned.error_after, reason=tuned.reason)
    return dataclasses.replace(solved, layers=tuned.layers, seconds={**solved.seconds, **seconds}, tuning=tuning)


def _texts(runner: BlockRunner, inputs: str, result: str, unit: BlockUnit) -> list[TuningText]:
    """The chunks that are tuned on. Their inputs and what is wanted are kept: every step would read them again.

    Args:
        runner: Runner of the worker's blocks, which holds the original block now.
        inputs: Stream whose hidden states are the block's inputs.
        result: Stream through the quantized block, in which the inputs of its layers may be rounded.
        unit: Unit of the block.
    """
    spec, weights = runner.spec, read_token_weights(runner, unit)

    def text(chunk: str) -> TuningText:
        state = runner.states.read(inputs, unit.index, chunk)
        wanted = runner.forward(unit.index, state, chunk).hidden

        def forward() -> torch.Tensor:
            with runner.rounding(result, unit):
                return runner.forward(unit.index, state, chunk).hidden

        return TuningText(forward, wanted, weights.of_output(chunk, wanted))

    return [text(chunk) for chunk in tuned_chunks(spec.chunks, spec.quantization.tune_steps)]
