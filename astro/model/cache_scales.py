"""The scales of an FP8 cache, and the largest keys and values from which they follow."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self

__all__ = ["FP8_MAX", "CacheScales", "LargestByModule", "LargestCached"]

FP8_MAX = 448.0
"""Largest number of FP8 (E4M3)."""
_LEAST = 2.0**-126
"""Smallest normal number of float32, which stands for the largest of numbers that are all 0."""


@dataclasses.dataclass(frozen=True)
class CacheScales:
    """What the keys and the values of an attention module are divided by before a cache holds them in FP8.

    Attributes:
        key: Scale of keys.
        value: Scale of values.
    """

    key: float
    value: float


@dataclasses.dataclass(frozen=True)
class LargestCached:
    """The largest magnitudes of what an attention module would cache.

    Attributes:
        key: Largest magnitude of a key.
        value: Largest magnitude of a value.
    """

    key: float
    value: float

    def __or__(self, other: "LargestCached") -> "LargestCached":
        """Return the largest magnitudes of both."""
        return LargestCached(max(self.key, other.key), max(self.value, other.value))

    @property
    def scales(self) -> CacheScales:
        """The scales with which the largest magnitudes become the largest FP8 number."""
        return CacheScales(max(self.key, _LEAST) / FP8_MAX, max(self.value, _LEAST) / FP8_MAX)


class LargestByModule:
    """The largest keys and values of each attention module of a block, which grow with every text."""

    def __init__(self) -> None:
        """Begin with no module."""
        self._largest: dict[str, LargestCached] = {}

    def add_(self, name: str, seen: LargestCached) -> None:
        """Add what one text showed.

        Args:
            name: Name of the attention module in the model.
            seen: Its largest key and value.
        """
        self._largest[name] = self._largest[name] | seen if name in self._largest else seen

    def absorb_(self, other: "LargestByModule") -> None:
        """Add what was seen elsewhere.

        Args:
            other: What was seen there; it stays as it is.
        """
        for name, seen in other._largest.items():
            self.add_(name, seen)

    @property
    def scales(self) -> dict[str, CacheScales]:
        """The scales that follow, by the module's name."""
        return {name: seen.scales for name, seen in self._largest.items()}

    def to_json(self) -> dict[str, list[float]]:
        """Return the largest key and value of each module as JSON types."""
        return {name: [seen.key, seen.value] for name, seen in self._largest.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Sequence[float]]) -> Self:
        """Read back what `to_json` returned.

        Args:
            content: The largest key and value by the module's name.
        """
        largest = cls()
        for name, (key, value) in content.items():
            largest.add_(name, LargestCached(key, value))
        return largest
