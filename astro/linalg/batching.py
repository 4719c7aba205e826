"""Layers of one shape that are solved side by side, as the experts of a layer are: one loop over columns for all.

Everything that works on them takes a leading dimension, B layers. What is solved together is a part of the arithmetic:
it depends on the model, the settings and the kind of device alone.
"""

from collections.abc import Sequence

import torch

from astro.linalg.tiling import cut, most_layers

__all__ = ["add_product_", "batches", "first_of", "stacked"]


def batches(shapes: Sequence[tuple[object, int, int]], device_type: str) -> list[range]:
    """Layers that are solved together, neighbours of one kind and shape.

    Args:
        shapes: kind, rows and columns of each layer; kind is what must be equal besides.
        device_type: "cpu" or "cuda".

    Returns:
        Indices of the layers of each batch, in order.
    """
    found: list[range] = []
    first = 0
    while first < len(shapes):
        last = first
        while last < len(shapes) and shapes[last] == shapes[first]:
            last += 1
        _, rows, columns = shapes[first]
        parts = cut(last - first, -(-(last - first) // most_layers(rows, columns, device_type)))
        found += [range(first + part.start, first + part.stop) for part in parts]
        first = last
    return found


def stacked(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of one shape side by side, [B, ...]; of one alone no copy is made: a wide layer's are gigabytes."""
    return layers[0].unsqueeze(0) if len(layers) == 1 else torch.stack(list(layers))


def add_product_(X: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float = 1.0) -> None:
    """X += α A B as one kernel, for matrices alone or side by side, [B, ., .]."""
    (X.addmm_ if X.ndim == 2 else X.baddbmm_)(A, B, alpha=alpha)


def first_of(found: torch.Tensor, names: Sequence[str]) -> str | None:
    """The name of the first layer of which something holds, bool [B] or a scalar; None where it holds of none."""
    which = found.reshape(-1).nonzero()
    return names[int(which[0])] if len(which) else None
