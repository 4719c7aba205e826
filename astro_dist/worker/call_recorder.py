"""The recording of what blocks are called with, chunk by chunk, while the calibration text is embedded."""

import torch

from astro.model.block_call import BlockCall
from astro.model.call_file import differing_tensors, save_calls
from astro.model.recording import record
from astro.model.skeleton import Skeleton
from astro.storage.checked_tensors import save_part
from astro_dist.run_directory.records import RunDirectory

__all__ = ["CallRecorder"]


class CallRecorder:
    """Records every chunk's calls. Those of the first chunk of a shape are kept whole, of others what differs."""

    def __init__(self, run: RunDirectory, skeleton: Skeleton, num_outputs: int) -> None:
        """Begin with no chunk.

        Args:
            run: Run directory.
            skeleton: The model, with everything outside its blocks loaded.
            num_outputs: Number of values that blocks return as a tuple.
        """
        self._run, self._skeleton, self._num_outputs = run, skeleton, num_outputs
        self._first: dict[torch.Size, list[BlockCall]] = {}
        self._different: dict[torch.Size, list[str]] = {}

    def record(self, chunk: str, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the hidden states of a chunk before the first block, and write what its blocks are called with.

        Args:
            chunk: Name of the chunk.
            input_ids: Tokens of the chunk, int64 [B, T].
        """
        hidden, calls = record(self._skeleton, input_ids, self._num_outputs)
        first = self._first.setdefault(input_ids.shape, calls)
        differing = [differing_tensors(call, known) for call, known in zip(calls, first, strict=True)]
        if any(differing):
            self._different.setdefault(input_ids.shape, []).append(chunk)
            for block, tensors in enumerate(differing):
                save_part(self._run.chunk_call(chunk, block), tensors)
        return hidden

    def save(self) -> None:
        """Write the files of calls, by which other workers know that all chunks are recorded."""
        for shape, calls in self._first.items():
            save_calls(self._run.calls(*shape), calls, self._num_outputs, self._different.get(shape, ()))
