"""What blocks are called with, as it was recorded when the calibration text was embedded."""

import torch

from astro.model.block_call import BlockCall
from astro.model.call_file import Recording, load_call, read_recording, tensors_of, with_tensors
from astro.storage.checked_tensors import load_part
from astro_dist.run_directory.layout import RunLayout
from astro_dist.schedule.names import SINGLE

__all__ = ["RecordedCalls"]


class RecordedCalls:
    """Reads the calls of blocks. What all chunks of a shape share is read once."""

    def __init__(self, run: RunLayout, device: torch.device) -> None:
        """Begin with no call.

        Args:
            run: Run directory.
            device: Device of the tensors in the calls.
        """
        self._run, self._device = run, device
        self._calls: dict[tuple[int, torch.Size], BlockCall] = {}
        self._recordings: dict[torch.Size, Recording] = {}

    def call(self, block: int, chunk: str, shape: torch.Size) -> BlockCall:
        """Return the call of a block for a chunk.

        Args:
            block: Index of the block.
            chunk: Name of the chunk.
            shape: Shape of the chunk's tokens, [B, T].

        Raises:
            DamagedError: A file is missing, or not as it was written.
        """
        if (block, shape) not in self._calls:
            self._calls[block, shape] = load_call(self._run.calls(*shape), block, self._device)
        call = self._calls[block, shape]
        if chunk not in self.recording(shape).different:
            return call
        tensors, _ = load_part(self._run.chunk_call(chunk, block))
        return with_tensors(call, {place: tensor.to(self._device) for place, tensor in tensors.items()})

    def of_sequences(self, block: int, chunk: str, shape: torch.Size) -> list[BlockCall] | None:
        """Return the call of a block for each sequence of a chunk alone, if `SINGLE` ones were recorded.

        Args:
            block: Index of the block.
            chunk: Name of the chunk.
            shape: Shape of the chunk's tokens, [B, T].

        Returns:
            The calls; None where something depends on the text that cannot be told apart by sequence.

        Raises:
            DamagedError: A file is missing, or not as it was written.
        """
        num_sequences, length = shape
        if num_sequences == 1:
            return [self.call(block, chunk, shape)]
        call, (_, other) = self.call(block, SINGLE[0], torch.Size((1, length))), SINGLE
        if other not in self.recording(torch.Size((1, length))).different:
            return [call] * num_sequences
        whole = tensors_of(self.call(block, chunk, shape))
        apart: dict[str, tuple[torch.Tensor, ...]] = {}
        for place in load_part(self._run.chunk_call(other, block))[0]:
            size, left = divmod(len(whole[place]), num_sequences)  # by sequence, or by token
            if left or size not in (1, length):
                return None
            apart[place] = whole[place].split(size)
        return [with_tensors(call, {place: parts[i] for place, parts in apart.items()}) for i in range(num_sequences)]

    def recording(self, shape: torch.Size) -> Recording:
        """Return what was seen of all blocks when chunks of a shape were embedded.

        Args:
            shape: Shape of the chunks' tokens, [B, T].

        Raises:
            DamagedError: The file is missing, or not as it was written.
        """
        if shape not in self._recordings:
            self._recordings[shape] = read_recording(self._run.calls(*shape))
        return self._recordings[shape]

    def clear(self) -> None:
        """Forget what was read."""
        self._calls.clear()
        self._recordings.clear()
