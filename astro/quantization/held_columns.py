"""Columns that corrections of low rank hold alone, so that the grid of a layer need not reach their weights.

Source: ASER, arXiv 2411.07762. Where inputs are smoothed, weights of outlier channels become as much larger as their
inputs become smaller, and with them the scales of all weights beside them. So W = W_s + W_o, of which W_o are those
columns. W_s is quantized, and the correction makes up for W − Q(W_s): for rounding errors, and for all of W_o.

Shapes: B input groups side by side, R rows of all members of one together, C columns.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Self

import torch

from astro.quantization.recipe import Recipe

__all__ = ["HeldColumns", "held_columns"]


def held_columns(members: Sequence[str], recipe: Recipe) -> tuple[int, ...]:
    """Return the columns of an input group that corrections hold; they are the same for all of its members.

    Args:
        members: Names of its layers.
        recipe: How they are quantized.
    """
    return recipe.corrections.columns.get(members[0], ()) if recipe.corrections is not None else ()


@dataclasses.dataclass(frozen=True)
class HeldColumns:
    """The weights W_o that were taken out of weights."""

    _held: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """Indices of the columns, int64 [N], and their weights, float32 [R, N], of each input group."""

    @classmethod
    def taken_from_(cls, W: torch.Tensor, input_groups: Sequence[Sequence[str]], recipe: Recipe) -> Self:
        """Take the columns that corrections hold out of weights, which leaves W_s.

        Args:
            W: Weights of all members of each input group, float32 [B, R, C]. The columns are zero afterwards.
            input_groups: Names of the members of each.
            recipe: How they are quantized.
        """
        held = []
        for of_group, members in zip(W, input_groups, strict=True):
            columns = torch.tensor(held_columns(members, recipe), dtype=torch.long, device=W.device)
            held.append((columns, of_group[:, columns]))
            of_group[:, columns] = 0
        return cls(tuple(held))

    @contextlib.contextmanager
    def put_back(self, W: torch.Tensor) -> Iterator[None]:
        """Put the columns back while the body of a `with` statement runs.

        Args:
            W: The weights from which they were taken.
        """
        for of_group, (columns, weights) in zip(W, self._held, strict=True):
            of_group[:, columns] = weights
        try:
            yield
        finally:
            for of_group, (columns, _) in zip(W, self._held, strict=True):
                of_group[:, columns] = 0
