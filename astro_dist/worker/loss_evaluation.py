"""What a model predicts of the held-out text, measured from the hidden states behind its last block."""

import math

from astro.errors import NumericalError
from astro.model.perplexity import measure_sequences
from astro.model.sequence_figures import SequenceFigures
from astro_dist.run_directory.unit_record import LossResult, UnitRecord
from astro_dist.schedule.calls import EvaluateLoss
from astro_dist.schedule.names import ORIGINAL
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.hidden_samples import hidden_errors

__all__ = ["evaluate_loss"]


def evaluate_loss(runner: BlockRunner, call: EvaluateLoss) -> UnitRecord:
    """Measure what a stream's model predicts of the held-out text, from the last block's output.

    A result is compared with the source model, whose last hidden states are still there, and so are samples of those
    behind every block.

    Args:
        runner: Runner of the worker's blocks.
        call: Call that names the stream.

    Raises:
        NumericalError: The sum is not finite.
    """
    run, last = runner.spec.run, len(runner.spec.plan.blocks)
    sequences: list[SequenceFigures] = []
    with runner.outside_loaded():
        for chunk in runner.spec.held_out_chunks:
            hidden = runner.states.read(call.stream, last, chunk).hidden
            num_outputs = runner.calls.recording(runner.tokens.shape(chunk)).num_outputs
            source = runner.states.read(ORIGINAL, last, chunk).hidden if call.stream != ORIGINAL else None
            sequences += measure_sequences(
                runner.skeleton, runner.tokens.input_ids(chunk), hidden, num_outputs, source, runner.spec.num_leading
            )
    total = sum(sequence.loss + sequence.divergence for sequence in sequences)
    if not math.isfinite(total):
        raise NumericalError(
            f"the loss on the held-out text is {total} (stream {call.stream}); a forward pass overflowed"
        )
    errors = hidden_errors(run, call.stream, last, runner.spec.held_out_chunks) if call.stream != ORIGINAL else ()
    return run.finish(call.unit, [], LossResult.of(sequences, errors))
