"""Rows are cut into tiles, and each tile is solved by itself.

Where the cuts are is a part of the arithmetic: it depends only on the model and the size of a tile. That follows from
the type of device, or, for GPUs, from the configuration; never from the card that is found.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it takes seconds, which callers that only cut need not wait for
    import torch

__all__ = ["TILE_ELEMENTS", "cut", "every", "most_layers", "near_rows", "row_tile", "row_tiles"]

_LEAST_ROWS = 1024
TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Weights of a tile by type of device, where nothing else is asked for. Fewer would save memory, but a column of few
rows takes no less time than the calls for it, on a GPU much more than on a CPU."""
_NEAR_ELEMENTS = 1 << 18
"""Elements on which a CPU works at once. With more, every operation of an elementwise chain would fetch them from
memory again."""


def cut(num_items: int, num_parts: int) -> list[slice]:
    """Cut items into contiguous parts that are as even as can be.

    Args:
        num_items: Number of items.
        num_parts: Number of parts; there are fewer where there are fewer items.

    Returns:
        The items of each part, in order.
    """
    count = min(num_parts, num_items)
    return [slice(num_items * i // count, num_items * (i + 1) // count) for i in range(count)]


def every(size: int, width: int) -> list[slice]:
    """Cut items into contiguous parts of equal width.

    Args:
        size: Number of items.
        width: Number of items in a part; the last part is shorter where the width does not divide the size.

    Returns:
        The items of each part, in order.
    """
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def most_layers(num_rows: int, num_columns: int, tile_elements: int) -> int:
    """Return how many layers of equal shape are solved side by side at most.

    Neither the weights of that many layers nor their Hessians have more elements than a tile, unless those of a single
    layer do.

    Args:
        num_rows: Rows of a layer.
        num_columns: Columns of a layer.
        tile_elements: Weights of a tile.

    Returns:
        The number of layers, at least 1.
    """
    return max(1, tile_elements // (max(num_rows, num_columns) * num_columns))


def row_tile(num_columns: int, tile_elements: int) -> int:
    """Return how many rows are solved at once at most.

    Args:
        num_columns: Columns of the layer.
        tile_elements: Weights of a tile.

    Returns:
        The number of rows.
    """
    return max(_LEAST_ROWS, tile_elements // num_columns)


def row_tiles(num_rows: int, num_columns: int, tile_elements: int, copies: int = 1) -> list[slice]:
    """Return the tiles in which the rows of a layer are solved.

    Args:
        num_rows: Rows of the layer.
        num_columns: Columns of the layer.
        tile_elements: Weights of a tile.
        copies: How many copies of each of its rows a tile holds.

    Returns:
        The rows of each tile, in order.
    """
    return cut(num_rows, -(-num_rows * copies // row_tile(num_columns, tile_elements)))


def near_rows(X: "torch.Tensor") -> list[slice]:
    """Cut rows so that the work on each part stays in the caches of a CPU core.

    Args:
        X: The matrices [..., R, C]; only their shape and device matter.

    Returns:
        The rows of each part, in order. On a GPU, which wants many rows at once, there is only one part.
    """
    return cut(X.shape[-2], 1 if X.device.type == "cuda" else -(-X.numel() // _NEAR_ELEMENTS))
