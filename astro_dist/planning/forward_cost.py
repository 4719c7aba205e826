"""What forward and backward passes cost: the layers, attention, what is elementwise, and the head with its loss."""

from collections.abc import Sequence

from astro_dist.planning.predicted_groups import PredictedInputGroup
from astro_dist.planning.units import Plan
from astro_dist.planning.work import Work

__all__ = ["ForwardCost"]

_DIFFERENTIATED = 2.3
"""Forwards that a forward with gradients to its input alone is worth: one product forth, and one of the same size back
for each layer, and attention's, which are two for each. 2.3 to 2.5 were measured on a CPU."""
_FORWARD_PASSES = {"cpu": 100.0, "cuda": 20.0}
"""Elementwise operations of a block's forward on each element of its hidden states, at the speed of the proximal map's
passes: norms, rotary embeddings, softmax, the activation function. 110 to 180 were measured on a CPU, of which some are
products with few rows; for a GPU they are counted in bytes of bfloat16, unfused."""
_LOGIT_PASSES = {"cpu": 20.0, "cuda": 6.0}
"""Elementwise operations on each logit for the loss, and as many for its gradient, counted in the same way."""


class ForwardCost:
    """Tells what passes of text through a model cost."""

    def __init__(self, plan: Plan, sequence_length: int, device_type: str) -> None:
        """Look at a model.

        Args:
            plan: Units of the run.
            sequence_length: Number of tokens in a sequence.
            device_type: Type of the device, "cpu" or "cuda".
        """
        self._plan, self._sequence_length, self._device_type = plan, sequence_length, device_type

    def forth(self, batches: Sequence[PredictedInputGroup], tokens: int) -> Work:
        """Count a block's forward: the layers' products, attention's two with its scores, and what is elementwise.

        Args:
            batches: Input groups of the block.
            tokens: Number of tokens.
        """
        shape = self._plan.forward_shape
        runs_all = bool(shape.dense_experts)
        layers = sum((1.0 if runs_all else batch.reach) * batch.weights for batch in batches)
        states = float(tokens) * self._plan.hidden_size
        attention = 2.0 * states * self._sequence_length if shape.heads else 0.0  # no score is left out
        return Work(2.0 * (tokens * layers + attention), elements=_FORWARD_PASSES[self._device_type] * states)

    def forth_and_back(self, batches: Sequence[PredictedInputGroup], tokens: int) -> Work:
        """Count a block's forward and the way back of the gradient at its output to its input.

        Args:
            batches: Input groups of the block.
            tokens: Number of tokens.
        """
        return self.forth(batches, tokens) * _DIFFERENTIATED

    def head(self, tokens: int) -> Work:
        """Count the product with the head, and the loss of its logits.

        Args:
            tokens: Number of tokens.
        """
        logits = tokens * self._plan.outside_weights / self._plan.hidden_size
        compute = 2.0 * tokens * self._plan.outside_weights
        return Work(compute, elements=_LOGIT_PASSES[self._device_type] * logits)
