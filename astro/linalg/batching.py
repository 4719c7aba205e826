"""Layers of equal shape are solved side by side, as experts are: a single loop over columns serves them all.

Functions that work on them take a leading dimension, B layers. Which layers are solved together is a part of the
arithmetic: it depends only on the model, the settings and the size of a tile.
"""

from collections.abc import Sequence

import torch

from astro.linalg.tiling import cut, most_layers

__all__ = ["add_product_", "batches", "first_of", "stacked"]


def batches(shapes: Sequence[tuple[object, int, int]], tile_elements: int) -> list[range]:
    """Choose the layers that are solved together: neighbours of equal kind and shape.

    Args:
        shapes: Kind, rows and columns of each layer. The kind is any value that must be equal besides the shape.
        tile_elements: Weights of a tile.

    Returns:
        The indices of the layers of each batch, in order.
    """
    result: list[range] = []
    first = 0
    while first < len(shapes):
        last = first
        while last < len(shapes) and shapes[last] == shapes[first]:
            last += 1
        _, rows, columns = shapes[first]
        parts = cut(last - first, -(-(last - first) // most_layers(rows, columns, tile_elements)))
        result += [range(first + part.start, first + part.stop) for part in parts]
        first = last
    return result


def stacked(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put tensors of equal shape side by side.

    Args:
        layers: A tensor for each of B layers.

    Returns:
        The tensors as [B, ...]. A single tensor is not copied, for those of a wide layer are gigabytes.
    """
    return layers[0].unsqueeze(0) if len(layers) == 1 else torch.stack(list(layers))


def stacked_padded(matrices: Sequence[torch.Tensor | None], num_columns: int) -> torch.Tensor | None:
    """Put matrices of different numbers of rows side by side, with rows of zeros below those that are shorter.

    Args:
        matrices: A matrix [N, C] for each of B layers; None stands for zeros alone.
        num_columns: Number C of columns.

    Returns:
        The matrices as [B, N, C]; None where none is given. A single matrix is not copied.
    """
    given = [matrix for matrix in matrices if matrix is not None]
    if not given:
        return None
    if len(given) == len(matrices) and len({len(matrix) for matrix in given}) == 1:
        return stacked(given)
    padded = given[0].new_zeros(len(matrices), max(map(len, given)), num_columns)
    for place, matrix in zip(padded, matrices, strict=True):
        if matrix is not None:
            place[: len(matrix)] = matrix
    return padded


def add_product_(X: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float = 1.0) -> None:
    """Add α A B to X in a single kernel.

    Args:
        X: The matrix [R, C], or matrices [B, R, C], to which the product is added in place.
        A: The left factor, [R, K] or [B, R, K].
        B: The right factor, [K, C] or [B, K, C].
        alpha: Factor α of the product.
    """
    (X.addmm_ if X.ndim == 2 else X.baddbmm_)(A, B, alpha=alpha)


def first_of(holds: torch.Tensor, names: Sequence[str]) -> str | None:
    """Return the name of the first layer for which a condition holds.

    Args:
        holds: Whether the condition holds for each layer, bool [B], or a scalar for a single layer.
        names: Names of the layers.

    Returns:
        The name, or None where the condition holds for no layer.
    """
    which = holds.reshape(-1).nonzero()
    return names[int(which[0])] if len(which) else None
