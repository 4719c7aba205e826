"""What the tuning of a block's scales costs."""

from collections.abc import Iterable, Sequence

from astro_dist.planning.forward_cost import ForwardCost
from astro_dist.planning.planned_run import PlannedRun
from astro_dist.planning.predicted_groups import PredictedInputGroup
from astro_dist.planning.work import Work
from astro_dist.schedule.names import is_held_out

__all__ = ["TuningCost", "tuned_chunks"]

_WITH_WEIGHTS = 3.3
"""Forwards that a forward with gradients to the weights is worth: a product forth and two back for each layer, one of
them to its inputs, and what is elementwise."""
_MEASURED = 3
"""Forwards of every chunk besides: for what is wanted, and for the error before and after."""
_ELEMENTWISE = 10.0
"""Elementwise operations of a step on each weight: to put it on its grid, and to sum its gradient for its scale."""


def tuned_chunks(chunks: Iterable[str], steps: int) -> list[str]:
    """Return the chunks that scales are tuned on: the first calibration chunks, of which no step takes two.

    Args:
        chunks: Names of all chunks in their order.
        steps: Number of steps.
    """
    return [chunk for chunk in chunks if not is_held_out(chunk)][:steps]


class TuningCost:
    """Tells what it costs to tune the scales of a block."""

    def __init__(self, planned: PlannedRun, forward: ForwardCost) -> None:
        """Look at a run.

        Args:
            planned: The run.
            forward: What passes through its blocks cost.
        """
        config, chunk_tokens = planned.config, planned.chunk_tokens
        self._steps, self._last_round = config.quantization.tune_steps, config.execution.rounds - 1
        self._tokens = [chunk_tokens[chunk] for chunk in tuned_chunks(chunk_tokens, self._steps)]
        self._forward, self._token_bytes = forward, planned.plan.hidden_size * planned.dtype.itemsize

    def work(self, batches: Sequence[PredictedInputGroup], round_index: int) -> Work:
        """Count what the tuning of a block takes.

        Args:
            batches: Input groups of the block.
            round_index: Index of the round; only the last one tunes.
        """
        if not self._tokens or round_index != self._last_round:
            return Work()
        once, size = sum(self._tokens), len(self._tokens)
        stepped = sum(self._tokens[step % size] for step in range(self._steps))
        passed = self._forward.forth(batches, once) * _MEASURED + self._forward.forth(batches, stepped) * _WITH_WEIGHTS
        elements = _ELEMENTWISE * self._steps * sum(batch.weights for batch in batches)
        return passed + Work(elements=elements, moved_bytes=float(once * self._token_bytes))
