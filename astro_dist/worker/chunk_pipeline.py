"""Chunks that pass through a block one after the other: reading, computing and writing go on at the same time.

A call returns when its files are whole. Until then the device would have nothing to do. So where the next chunk's input
is read before the files are written, that chunk is passed on already; the next call finds its output there.

    reader   chunk 1      chunk 2            chunk 3
    device   chunk 0      chunk 1            chunk 2
    writer                chunk 0            chunk 1
    calls    ├──── chunk 0 ────────┤├──── chunk 1 ────────┤

So a chunk takes as long as the slowest of the three, and not their sum. Only one output is kept. Where the next call is
another one, it is dropped, and what is lost is time in which the device had nothing to do.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from itertools import pairwise
from typing import Any, Generic, TypeVar

from astro.model.block_call import BlockState
from astro_dist.worker.hidden_states import HiddenStates

__all__ = ["ChunkPipeline", "Passage"]

Output = TypeVar("Output")


@dataclasses.dataclass(frozen=True)
class Passage(Generic[Output]):
    """How chunks pass through a block in calls of one kind.

    Attributes:
        place: Kind of the calls, and all that tells the block from others.
        inputs: Function that returns stream, block and chunk of each state that a chunk's output is computed from.
        compute: Function that returns the output of a chunk from these states. It changes nothing that `save` was given
            before.
        save: Function that begins to write a chunk's output.
    """

    place: Hashable
    inputs: Callable[[str], list[tuple[str, int, str]]]
    compute: Callable[[str, Sequence[BlockState]], Output]
    save: Callable[[str, Output], None]


@dataclasses.dataclass(frozen=True)
class _Ahead:
    """An output that is not asked for yet.

    Attributes:
        place: Place of the passage.
        chunk: Name of the chunk.
        output: Output of the chunk.
    """

    place: Hashable
    chunk: str
    output: Any


class ChunkPipeline:
    """Passes chunks through blocks, and keeps the output of one chunk that is not asked for yet."""

    def __init__(self, states: HiddenStates, chunks: Sequence[str]) -> None:
        """Begin with nothing.

        Args:
            states: Hidden states of chunks, which are read and written.
            chunks: Names of the chunks in the order in which they travel.
        """
        self._states = states
        self._following = dict(pairwise(chunks))
        self.forget()

    def forget(self) -> None:
        """Let go of what was computed, and of which chunk was asked for last."""
        self._last: tuple[Hashable, str] | None = None
        self._ahead: _Ahead | None = None
        self._is_in_order = False

    def run(self, passage: Passage[Output], chunk: str, in_order: bool = False) -> None:
        """Pass a chunk through a block, and write its output.

        The next chunk is read and computed ahead where it follows. Chunks that were asked for one after the other go on
        like that. Where several workers share the chunks of a block, they do not, and nothing is computed in vain.

        Args:
            passage: How the chunk passes.
            chunk: Name of the chunk.
            in_order: Whether it is sure that all chunks will be asked for in their order.

        Raises:
            StorageError: The output could not be written.
        """
        before, self._last = self._last, (passage.place, chunk)
        follows = before is not None and before[0] == passage.place and self._following.get(before[1]) == chunk
        self._is_in_order = in_order or follows
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (ahead.place, ahead.chunk) == self._last:
            output: Output = ahead.output
        else:
            output = self._compute(passage, chunk)
        passage.save(chunk, output)
        self._go_on(passage, chunk)
        self._states.finish_writing()

    def _go_on(self, passage: Passage[Output], chunk: str) -> None:
        """Compute the next chunk's output if its input is there before the files of this chunk are written."""
        following, writing = self._next(chunk), self._states.writing
        reading = self._states.expect(*passage.inputs(following)) if following else None
        if following is None or writing is None or reading is None:
            return
        wait((writing, reading), return_when=FIRST_COMPLETED)
        if not writing.done() and reading.exception() is None:
            self._ahead = _Ahead(passage.place, following, self._compute(passage, following))

    def _compute(self, passage: Passage[Output], chunk: str) -> Output:
        """Return the output of a chunk; the input of the next one is read meanwhile."""
        states = self._states.read_several(*passage.inputs(chunk))
        following = self._next(chunk)
        if following is not None:
            self._states.expect(*passage.inputs(following))
        return passage.compute(chunk, states)

    def _next(self, chunk: str) -> str | None:
        """The chunk that will be asked for next; None where nothing says so."""
        return self._following.get(chunk) if self._is_in_order else None
