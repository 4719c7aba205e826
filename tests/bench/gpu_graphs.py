"""The column loops as CUDA graphs: a fourth way, which the product does not have.

A block of columns works in arrays that stay where they are. So what the host asks for in the loop over its columns can
be taken down once, and asked for with a single launch for every block after that. Arrays belong to a tile; each tile
pays for its first block, which runs as ever, and for taking down the second.
"""

import contextlib
import weakref
from collections.abc import Iterator
from unittest import mock

import torch

from astro.linalg.panels import Panels

__all__ = ["graphs"]


@contextlib.contextmanager
def graphs() -> Iterator[None]:
    """Settle blocks of columns by CUDA graphs in the body of a `with` statement. The thread runs its loops plain."""
    settle_ = Panels.settle_
    taken_down: weakref.WeakKeyDictionary[Panels, torch.cuda.CUDAGraph | None] = weakref.WeakKeyDictionary()

    def replayed_(panels: Panels) -> None:
        if panels not in taken_down:
            taken_down[panels] = None
            settle_(panels)  # libraries ask for their memory now
            return
        graph = taken_down[panels]
        if graph is None:
            graph = taken_down[panels] = _taken_down(lambda: settle_(panels))
        graph.replay()

    with mock.patch.object(Panels, "settle_", replayed_):
        yield


def _taken_down(action) -> torch.cuda.CUDAGraph:
    """Return a graph of what an action asks of the GPU, which is not done yet."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # `torch.cuda.graph` would empty the cache of memory first, each time.
    with torch.cuda.stream(stream):
        graph.capture_begin()
        action()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph
