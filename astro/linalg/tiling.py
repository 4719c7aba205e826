"""Rows are cut into tiles that are solved apart: part of the arithmetic, of the model and the kind of device alone."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # seconds that who only cuts need not wait for
    import torch

__all__ = ["cut", "every", "most_layers", "near_rows", "row_tile", "row_tiles"]

_LEAST_ROWS = 1024
_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""What is worked on at once bounds the memory of a solve, but a column of few rows takes no less time than its calls,
on a GPU much more than on a CPU."""
_NEAR_ELEMENTS = 1 << 18
"""A chain of elementwise operations on more would fetch them from a CPU's memory every time."""


def cut(num_items: int, num_parts: int) -> list[slice]:
    """Contiguous parts, as even as can be; fewer where there are fewer items."""
    count = min(num_parts, num_items)
    return [slice(num_items * i // count, num_items * (i + 1) // count) for i in range(count)]


def every(size: int, width: int) -> list[slice]:
    """Contiguous parts of a width, the last one shorter where it does not divide."""
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def most_layers(num_rows: int, num_columns: int, device_type: str) -> int:
    """Layers of one shape that are solved side by side, at most: no more than make a tile, or their Hessians do."""
    return max(1, _ELEMENTS[device_type] // (max(num_rows, num_columns) * num_columns))


def row_tile(num_columns: int, device_type: str) -> int:
    """Rows that are solved at once, at most."""
    return max(_LEAST_ROWS, _ELEMENTS[device_type] // num_columns)


def row_tiles(num_rows: int, num_columns: int, device_type: str, copies: int = 1) -> list[slice]:
    """The tiles in which rows are solved, where a tile holds so many copies of each of its rows."""
    return cut(num_rows, -(-num_rows * copies // row_tile(num_columns, device_type)))


def near_rows(X: "torch.Tensor") -> list[slice]:
    """Rows of X [..., R, C] that stay close to a CPU core; on a GPU, which wants many at once, all of them."""
    return cut(X.shape[-2], 1 if X.device.type == "cuda" else -(-X.numel() // _NEAR_ELEMENTS))
