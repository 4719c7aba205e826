"""A sum of products whose factors may wait until they are larger than the sum would be.

Shapes: C columns (inputs of the layer).
"""

import abc
from typing import Self

import torch

__all__ = ["ProductSum"]


class ProductSum(abc.ABC):
    """Sums products over chunks of calibration tokens, in the order in which they are added, in float32."""

    def __init__(self, num_columns: int, device: torch.device, keep_factors: bool) -> None:
        """Begin with an empty sum.

        Args:
            num_columns: Number C of columns.
            device: Device of the sum.
            keep_factors: Whether factors are kept as they are until they are larger than the sum would be. The bits are
                the same; it saves memory for many layers that each see few tokens, as experts do.
        """
        self._shape, self._device = (num_columns, num_columns), device
        self._sum: torch.Tensor | None = None
        self._kept: list[tuple[torch.Tensor, ...]] = []
        self._room = 4 * num_columns**2 if keep_factors else 0

    @property
    def kept_bytes(self) -> int:
        """Size of the factors that wait, in bytes."""
        return sum(factor.nbytes for factors in self._kept for factor in factors)

    @property
    def partial(self) -> torch.Tensor:
        """Sum so far, float32 [C, C], as far as products fill it."""
        self._fold()
        return self._started()

    @abc.abstractmethod
    def _add_product_(self, total: torch.Tensor, *factors: torch.Tensor) -> None:
        """Add the product of some factors to a sum."""

    def _keep(self, *factors: torch.Tensor) -> None:
        self._kept.append(factors)
        if self.kept_bytes > self._room:
            self._fold()

    def _absorb_sum_(self, other: Self) -> None:
        """Add the sum of another, which stays as it is; factors that it keeps are shared, not copied."""
        if other._sum is not None:
            self.partial.add_(other._sum)
        for factors in other._kept:
            self._keep(*factors)

    def _take_(self) -> torch.Tensor:
        """Return the sum, and begin with an empty one."""
        total, self._sum = self.partial, None
        return total

    def _started(self) -> torch.Tensor:
        if self._sum is None:
            self._sum = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
        return self._sum

    def _fold(self) -> None:
        kept, self._kept = self._kept, []
        for factors in kept:
            self._add_product_(self._started(), *factors)
