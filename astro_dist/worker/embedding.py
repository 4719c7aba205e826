"""The pass of the text through the embeddings, in which it is recorded what blocks are called with."""

from collections.abc import Iterator

import torch

from astro.model.block_call import BlockState
from astro.model.recording import count_outputs
from astro_dist.run_directory.unit_record import EmbedResult, UnitRecord
from astro_dist.schedule.names import EMBED, ORIGINAL, SINGLE
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.call_recorder import CallRecorder
from astro_dist.worker.smoother import PROBE, PROBE_TOKENS

__all__ = ["embed_text"]

_PROBE_TOKENS = 8
"""Tokens of the short forward that shows what blocks return."""


def embed_text(runner: BlockRunner) -> UnitRecord:
    """Make every chunk's hidden states before the first block, and record what else blocks are called with.

    Args:
        runner: Runner of the worker's blocks.
    """
    spec, tokens = runner.spec, runner.tokens
    with runner.outside_loaded(with_block=spec.plan.blocks[0]):
        num_outputs = count_outputs(runner.skeleton, tokens.input_ids(spec.chunks[0])[:1, :_PROBE_TOKENS])
        runner.skeleton.blocks[0].to("meta")
        recorder = CallRecorder(spec.run, runner.skeleton, num_outputs)
        for chunk in spec.chunks:
            hidden = recorder.record(chunk, tokens.input_ids(chunk))
            runner.states.save(ORIGINAL, 0, chunk, BlockState(hidden))
        if spec.activations.smoothing != "none":
            recorder.record(PROBE, tokens.input_ids(spec.calibration_chunks[0])[:1, :PROBE_TOKENS])
        if spec.quantization.tune_steps:
            # Two, because blocks may be called otherwise for each text.
            for name, ids in zip(SINGLE, _sequences(runner), strict=False):
                recorder.record(name, ids)
        runner.states.finish_writing()
        recorder.save()
    return spec.run.finish(EMBED, [], EmbedResult(compute_dtype=str(spec.compute_dtype), device=spec.device))


def _sequences(runner: BlockRunner) -> Iterator[torch.Tensor]:
    """The tokens [1, T] of each calibration sequence."""
    for chunk in runner.spec.calibration_chunks:
        yield from runner.tokens.input_ids(chunk).split(1)
