"""What the tuning of a block's scales costs."""

from collections.abc import Sequence

from astro_dist.planning.forward_cost import ForwardCost
from astro_dist.planning.planned_run import PlannedRun
from astro_dist.planning.predicted_groups import PredictedInputGroup
from astro_dist.planning.work import Work

__all__ = ["TuningCost"]

_WITH_WEIGHTS = 3.3
"""Forwards that a forward with gradients to the weights is worth: a product forth and two back for each layer, one of
them to its inputs, and what is elementwise."""
_MEASURED = 3
"""Forwards of every sequence besides: for what is wanted, and for the error before and after."""
_ELEMENTWISE = 10.0
"""Elementwise operations of a step on each weight: to put it on its grid, and to sum its gradient for its scale."""


class TuningCost:
    """Tells what it costs to tune the scales of a block."""

    def __init__(self, planned: PlannedRun, forward: ForwardCost) -> None:
        """Look at a run.

        Args:
            planned: The run.
            forward: What passes through its blocks cost.
        """
        config = planned.config
        self._steps, self._last_round = config.quantization.tune_steps, config.execution.rounds - 1
        self._sequences, self._length = config.calibration.most_samples, config.calibration.longest_sequence
        self._forward, self._token_bytes = forward, planned.plan.hidden_size * planned.dtype.itemsize

    def work(self, batches: Sequence[PredictedInputGroup], round_index: int, read_bytes: int = 0) -> Work:
        """Count what the tuning of a block takes.

        Args:
            batches: Input groups of the block.
            round_index: Index of the round; only the last one tunes.
            read_bytes: Size of the original block, which is read again where the call has not read it for the solve.
        """
        if not self._steps or round_index != self._last_round:
            return Work()
        once, stepped = min(self._steps, self._sequences) * self._length, self._steps * self._length
        passed = self._forward.forth(batches, once) * _MEASURED + self._forward.forth(batches, stepped) * _WITH_WEIGHTS
        elements = _ELEMENTWISE * self._steps * sum(batch.weights for batch in batches)
        return passed + Work(elements=elements, moved_bytes=float(once * self._token_bytes + read_bytes))
