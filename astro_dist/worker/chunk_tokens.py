"""The tokens of every chunk, of the calibration text and of the held-out text."""

import torch

from astro.storage.checked_tensors import load_part
from astro_dist.run_directory.layout import RunLayout

__all__ = ["ChunkTokens"]


class ChunkTokens:
    """Knows the tokens of chunks. Their file is read once."""

    def __init__(self, run: RunLayout, device: torch.device) -> None:
        """Begin without the file.

        Args:
            run: Layout of the run directory.
            device: Device on which tokens are wanted.
        """
        self._run, self._device = run, device
        self._tokens: dict[str, torch.Tensor] | None = None

    def input_ids(self, chunk: str) -> torch.Tensor:
        """Return the tokens of a chunk on the device, int64 [B, T].

        Args:
            chunk: Name of the chunk.
        """
        return self._of(chunk).to(self._device)

    def shape(self, chunk: str) -> torch.Size:
        """Return the shape of a chunk's tokens, [B, T].

        Args:
            chunk: Name of the chunk.
        """
        return self._of(chunk).shape

    def _of(self, chunk: str) -> torch.Tensor:
        if self._tokens is None:
            self._tokens, _ = load_part(self._run.tokens)
        return self._tokens[chunk]
