"""How large the activations are in each channel of a layer's input, over all calibration tokens.

Shapes: T tokens, C columns (channels of the input).
"""

import dataclasses
from typing import Self

import torch

__all__ = ["ChannelStatistics", "ChannelSums"]


@dataclasses.dataclass(frozen=True)
class ChannelStatistics:
    """What calibration learned of the channels of one input.

    Attributes:
        mean: Mean of |x| over the tokens, float32 [C].
        maximum: Largest |x|, float32 [C].
    """

    mean: torch.Tensor
    maximum: torch.Tensor

    def tied(self, rows: torch.Tensor, num_rows: int) -> Self:
        """Return the statistics of channels that can only be scaled together: a mean of means, the largest maximum.

        Args:
            rows: What each channel is scaled with, int64 [C], below `num_rows`.
            num_rows: Number R of what can be scaled apart.

        Returns:
            Statistics [R]; 0 where no channel belongs to a row.
        """
        counts = torch.bincount(rows, minlength=num_rows).clamp(min=1)
        empty = torch.zeros(num_rows, dtype=self.mean.dtype, device=self.mean.device)
        mean = empty.index_add(0, rows, self.mean) / counts
        return dataclasses.replace(self, mean=mean, maximum=empty.scatter_reduce(0, rows, self.maximum, "amax"))


class ChannelSums:
    """Adds up |x| over chunks of calibration tokens.

    Sums of a chunk are formed first. So chunks that were seen by different machines give the same bits, if they are
    merged in a fixed order.

    Attributes:
        total: Sum of |x|, float64 [C].
        maximum: Largest |x|, float32 [C].
        num_tokens: Number of tokens that were added.
    """

    def __init__(self, num_columns: int, device: torch.device) -> None:
        """Begin with no token.

        Args:
            num_columns: Number C of channels.
            device: Device of the sums.
        """
        self.total = torch.zeros(num_columns, dtype=torch.float64, device=device)
        self.maximum = torch.zeros(num_columns, dtype=torch.float32, device=device)
        self.num_tokens = 0

    def add_(self, X: torch.Tensor) -> None:
        """Add the inputs of some tokens.

        Args:
            X: Inputs [..., C] in any float dtype.
        """
        sizes = X.reshape(-1, X.shape[-1]).abs()
        if len(sizes):
            self.merge_(sizes.sum(0, dtype=torch.float64), sizes.amax(0).float(), len(sizes))

    def merge_(self, total: torch.Tensor, maximum: torch.Tensor, num_tokens: int) -> None:
        """Add what was summed elsewhere.

        Args:
            total: Sum of |x|, float64 [C].
            maximum: Largest |x|, float32 [C].
            num_tokens: Number of tokens in both.
        """
        self.total += total.to(self.total.device)
        self.maximum = torch.maximum(self.maximum, maximum.to(self.maximum.device))
        self.num_tokens += num_tokens

    def finish(self) -> ChannelStatistics:
        """Return the statistics of all tokens that were added; zeros where there was none."""
        return ChannelStatistics((self.total / max(self.num_tokens, 1)).float(), self.maximum)
