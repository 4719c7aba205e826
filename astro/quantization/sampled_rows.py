"""The rows of an input group on which is measured what is to be chosen for all of them.

Shapes: B input groups side by side, R rows of all members of one together, S of which are sampled, C columns.
"""

import torch

__all__ = ["num_sample_rows", "sample_rows"]

_SAMPLED_ROWS = 128
"""Rows, evenly spaced over the input group, that β and widths are measured on; where there are few, one in eight."""


def num_sample_rows(num_rows: int) -> int:
    """Return how many rows of an input group β and widths are measured on."""
    return min(max(num_rows // 8, 1), _SAMPLED_ROWS)


def sample_rows(W: torch.Tensor) -> torch.Tensor:
    """Return the rows that β and widths are measured on, [B, S, C] of [B, R, C]."""
    num_rows = W.shape[-2]
    return W[..., torch.linspace(0, num_rows - 1, num_sample_rows(num_rows), device=W.device).round().long(), :]
