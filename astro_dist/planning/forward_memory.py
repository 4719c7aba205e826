"""The memory that a block's forward takes for one chunk, and the backward pass that weighs its tokens."""

from collections.abc import Sequence

import torch

from astro_dist.planning.predicted_groups import PredictedInputGroup
from astro_dist.planning.units import Plan

__all__ = ["ForwardMemory"]

_STATES = 6
"""Hidden states that a block's forward holds at its peak: the residual, its norm, queries, keys, values and attention's
output."""
_AUTOGRAD = 2.0
"""Size of what a backward pass holds of a block, relative to the inputs and outputs of its layers, or to what a forward
holds of attention's scores: as much is kept, and as much are gradients."""
_OF_SCALES = 48
"""Bytes that are kept of a scale while it is tuned: itself and its zero point, how far it moved, the gradient, Adam's
two moments and as much again while it steps, and the scale that follows, as it is and as it is stored."""
_MATH_BYTES = 12
"""Bytes that torch's plain form of fused attention holds for each score: three float32 copies of them."""


class ForwardMemory:
    """Foretells what passes of one chunk through a block hold beside the block."""

    def __init__(self, plan: Plan, sequence_length: int, dtype: torch.dtype, device_type: str) -> None:
        """Look at a run.

        Args:
            plan: Units of the run.
            sequence_length: Number of tokens in a sequence.
            dtype: Dtype of forward passes.
            device_type: Type of the device, "cpu" or "cuda".
        """
        self._shape, self._hidden_size = plan.forward_shape, plan.hidden_size
        self._sequence_length, self._itemsize, self._on_gpu = sequence_length, dtype.itemsize, device_type == "cuda"

    def forth(
        self, batches: Sequence[PredictedInputGroup], sequences: int, num_streams: int, is_rounded: bool = False
    ) -> float:
        """Return the bytes that a forward holds at its peak, the inputs of the layers being taken.

        Args:
            batches: Input groups of the block.
            sequences: Number of sequences in the chunk.
            num_streams: Number of models whose inputs are compared: 2 where a drift is summed, else 1.
            is_rounded: Whether the inputs of layers are rounded.
        """
        tokens, itemsize = sequences * self._sequence_length, self._itemsize
        widest = max([self._hidden_size, *(batch.columns for batch in batches)])
        inputs = (3 * itemsize + 4) * num_streams  # inputs in every stream, and their drift
        if is_rounded:  # for the forward and for the sums, two steps of that in float32, and how they differ
            inputs += 2 * itemsize + 12
        held = float(tokens) * (_STATES * self._hidden_size * itemsize + widest * inputs)
        if any(batch.reach < 1 for batch in batches):
            held += self._shape.dense_experts * float(tokens) * self._shape.dense_width * itemsize
        return held + self._eager_scores(sequences)

    def back(self, batches: Sequence[PredictedInputGroup], sequences: int) -> float:
        """Return the bytes that a backward pass holds at its peak.

        Args:
            batches: Input groups of the block.
            sequences: Number of sequences in the chunk.
        """
        tokens, is_dense = sequences * self._sequence_length, bool(self._shape.dense_experts)
        # Autograd keeps the inputs and the outputs of every layer, and about as much between them.
        kept = sum((1.0 if is_dense else batch.reach) * batch.count * (batch.rows + batch.columns) for batch in batches)
        layers = _AUTOGRAD * tokens * (kept + _STATES * self._hidden_size) * self._itemsize
        return layers + _AUTOGRAD * max(self._eager_scores(sequences), self._plain_scores(sequences))

    def tuned(self, batches: Sequence[PredictedInputGroup], sequences: int, columns: float, largest: float) -> float:
        """Return the bytes that are held at the peak while the scales of the block are tuned.

        Besides a backward pass of one sequence these are the inputs and wanted outputs of all, the integers of the
        layers, and what is kept of each scale. The gradient of one weight is there at a time, and twice a part of it
        in float32.

        Args:
            batches: Input groups of the block.
            sequences: Number of sequences that scales are tuned on.
            columns: Number of columns that share a scale.
            largest: Number of weights in the largest weight that has a gradient of its own.
        """
        texts = 2.0 * sequences * self._sequence_length * self._hidden_size * self._itemsize
        quantized = (1.0 + _OF_SCALES / columns) * sum(batch.weights for batch in batches)
        return self.back(batches, 1) + texts + quantized + (self._itemsize + 8) * largest

    def _eager_scores(self, sequences: int) -> float:
        """Return the bytes of attention's scores where the model's class holds them; else 0.

        With sinks: the scores, the scores with sinks beside them, and one of the steps to their softmax. Without: the
        scores, their softmax in float32, and that in the compute dtype where it is another.
        """
        if not self._shape.is_eager:
            return 0.0
        itemsize = self._itemsize
        converted = 0 if itemsize == 4 else itemsize if self._on_gpu else itemsize + 4
        each = 3 * itemsize if self._shape.has_sinks else itemsize + 4 + converted
        return each * self._num_scores(sequences)

    def _plain_scores(self, sequences: int) -> float:
        """Return the bytes of attention's scores in a backward pass on a GPU where torch has to hold them; else 0.

        Of the forms that add up in a fixed order, flash attention takes neither a mask, which a window wants, nor
        float32, and the plain one holds the scores.
        """
        is_masked = 0 < self._shape.window < self._sequence_length
        is_plain = self._on_gpu and (is_masked or self._itemsize == 4)
        return _MATH_BYTES * self._num_scores(sequences) if is_plain else 0.0

    def _num_scores(self, sequences: int) -> float:
        return float(sequences) * self._shape.heads * self._sequence_length**2
