"""The hidden states of chunks before each block: files that are read ahead and written behind."""

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from astro.model.block_call import BlockState
from astro.storage.device_copies import DeviceCopies
from astro.storage.part_writer import PartWriter
from astro_dist.run_directory.layout import RunLayout
from astro_dist.schedule.names import is_held_out
from astro_dist.worker.hidden_samples import sample_of
from astro_dist.worker.prefetch import Prefetch

__all__ = ["HiddenStates"]

_HIDDEN = "hidden"
"""Name of the hidden states in a file; other tensors beside them have the names that `BlockState` gives them."""


class HiddenStates:
    """Reads and writes the states of chunks, which travel from block to block.

    A place is the stream in which a chunk travels, the index of the block that it is before, and the chunk's name.
    """

    def __init__(self, run: RunLayout, copies: DeviceCopies) -> None:
        """Begin with no file.

        Args:
            run: Layout of the run directory.
            copies: Copies to the device on which the states are wanted.
        """
        self._run, self._prefetch, self._writer = run, Prefetch(copies), PartWriter(copies)

    def read(self, stream: str, index: int, chunk: str, then: tuple[str, str] | None = None) -> BlockState:
        """Return the state of a chunk before a block.

        Args:
            stream: Stream in which the chunk travels.
            index: Index of the block.
            chunk: Name of the chunk.
            then: Stream and name of the chunk that will be wanted next before the same block, which is read meanwhile.

        Raises:
            DamagedError: The file is missing, or not as it was written.
        """
        state = self.read_several((stream, index, chunk))[0]
        if then is not None:
            self.expect((then[0], index, then[1]))
        return state

    def read_several(self, *places: tuple[str, int, str]) -> list[BlockState]:
        """Return several states at once.

        Args:
            places: Place of each.

        Raises:
            DamagedError: A file is missing, or not as it was written.
        """
        tensors = self._prefetch.take(*(self._run.hidden(*place) for place in places))
        return [BlockState(of_place.pop(_HIDDEN), of_place) for of_place in tensors]

    def expect(self, *places: tuple[str, int, str]) -> "Future[Any] | None":
        """Begin to read the states that will be wanted next; `read_several` returns them.

        Args:
            places: Place of each.

        Returns:
            The reading of the states; None where not all of them are there yet.
        """
        paths = [self._run.hidden(*place) for place in places]
        self._prefetch.expect(*paths)
        return self._prefetch.reading(*paths)

    def forget(self) -> None:
        """Let go of the states that were read ahead, or are being read."""
        self._prefetch.forget()

    def save(self, stream: str, index: int, chunk: str, state: BlockState) -> None:
        """Begin to write the state of a chunk before a block, unless it is there: other hardware may round otherwise.

        Of a chunk that is held out, a sample is kept longer than the state.

        Args:
            stream: Stream in which the chunk travels.
            index: Index of the block.
            chunk: Name of the chunk.
            state: The state, which nobody may change before `finish_writing` has returned.
        """
        path = self._run.hidden(stream, index, chunk)
        if not path.exists():
            if index and is_held_out(chunk):
                self.begin_writing(self._run.sample(stream, index, chunk), sample_of(state.hidden))
            self.begin_writing(path, {_HIDDEN: state.hidden, **state.others})

    def begin_writing(self, path: Path, tensors: Mapping[str, torch.Tensor], note: str = "") -> None:
        """Begin to write a file of a chunk that other calls will read: a state, or what was measured of it.

        Args:
            path: Where the file belongs.
            tensors: Tensors by name, which nobody may change before `finish_writing` has returned.
            note: Text that is kept beside the tensors.

        Raises:
            StorageError: A file that was begun before could not be written.
        """
        self._writer.begin(path, tensors, note)

    @property
    def writing(self) -> "Future[None] | None":
        """The file that was begun last; None where every file is whole."""
        return self._writer.last

    def finish_writing(self) -> None:
        """Wait until every file that was begun is whole.

        Raises:
            StorageError: One of them could not be written.
        """
        self._writer.finish()

    def give_up_writing(self) -> None:
        """Wait until nothing is written any more: the call that began it has failed."""
        self._writer.give_up()
