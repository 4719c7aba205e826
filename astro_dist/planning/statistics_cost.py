"""What the statistics of a block's inputs cost: Hessians, the drifts beside them, and the rounding of inputs."""

from collections.abc import Iterable, Sequence

import torch

from astro_dist.config.schema import RunConfig
from astro_dist.planning.correction_cost import rounding_drifts
from astro_dist.planning.predicted_groups import PredictedInputGroup
from astro_dist.planning.work import Work

__all__ = ["StatisticsCost"]

_PACKED_BYTES = 2.1
"""Bytes of a Hessian in a file for each of its elements. One half of the matrix is kept in float32, which is 2, and a
little more for the squares on the diagonal: of 5120 columns 2.1 bytes are kept, in strips of 256 columns."""
_ROUNDING_PASSES = 6
"""Elementwise operations on each input that is rounded, at the speed of the proximal map's passes: 20 to 34 ms for 6.3
million inputs in float32 on a CPU, one thread."""


class StatisticsCost:
    """Counts what it takes to sum the statistics of inputs, and what their files hold.

    Attributes:
        is_compensated: Whether the drift from the source is summed.
        corrects_rounding: Whether corrections of low rank make up for rounded inputs.
        square_bytes: Bytes in a file for each element of a Hessian, with the drifts beside it.
    """

    def __init__(self, config: RunConfig, dtype: torch.dtype, device_type: str) -> None:
        """Look at the settings of a run.

        Args:
            config: Configuration of the run.
            dtype: Dtype of forward passes.
            device_type: Type of the device, "cpu" or "cuda".
        """
        self._multiplies_halves = device_type == "cuda" and dtype.itemsize == 2
        self._is_rounded = config.activations.scheme is not None
        self.is_compensated = config.makes_up_for_layers
        self.corrects_rounding = config.reconstruction.minds_rounding(config.activations)
        # Experts have no corrections, and are counted as if they had.
        of_rounding = rounding_drifts(config)
        self._num_drifts = self.is_compensated + of_rounding
        self.square_bytes = _PACKED_BYTES + 4.0 * self._num_drifts

    def sums(self, batches: Sequence[PredictedInputGroup], tokens: int, drifts: bool = True) -> Work:
        """Count XᵀX on and above the diagonal, and drifts. A GPU multiplies 16-bit inputs as they are, a drift as two.

        Args:
            batches: Input groups that are summed.
            tokens: Number of tokens.
            drifts: Whether inputs may have drifted from the source.
        """
        num_drifts = self._num_drifts - (self.is_compensated and not drifts)
        operations = tokens * sum(batch.reach * batch.square for batch in batches)
        operations *= 1.0 + num_drifts * (4.0 if self._multiplies_halves else 2.0)
        summed = Work(operations) if self._multiplies_halves else Work(exact=operations)
        return summed + self.rounding(batches, tokens)

    def rounding(self, batches: Iterable[PredictedInputGroup], tokens: int) -> Work:
        """Count what it takes to bring the inputs of every layer to the grid of a server, where they are rounded.

        Args:
            batches: Input groups that read the inputs.
            tokens: Number of tokens.
        """
        inputs = tokens * sum(batch.reach * batch.count * batch.columns for batch in batches)
        return Work(elements=_ROUNDING_PASSES * self._is_rounded * inputs)
