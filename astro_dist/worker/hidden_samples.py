"""A few tokens of the hidden states behind every block, by which a result is compared with the source on its way.

The hidden states themselves are deleted as soon as the next block has read them, long before those of the result are
there. Of each held-out sequence the last tokens of equal pieces are kept; the first token, whose hidden state is of
another size in many models, is not among them. Where a sample is missing, as after a damage, its block has no figure.
"""

from collections.abc import Sequence

import torch

from astro.linalg.tiling import cut
from astro.storage.checked_tensors import load_part
from astro_dist.run_directory.layout import RunLayout
from astro_dist.schedule.names import ORIGINAL

__all__ = ["hidden_errors", "sample_of"]

_TOKENS = 16
"""Number of tokens of a sequence that are kept, at most."""
_SAMPLE = "sample"
"""Name of the tensor in a file."""


def sample_of(hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a file that keeps a few tokens of the hidden states of a chunk.

    Args:
        hidden: Hidden states [B, T, ...].
    """
    # Views of single tokens: a list of places would be copied to a GPU first, for which the host waits.
    kept = [hidden[:, piece.stop - 1] for piece in cut(hidden.shape[1], _TOKENS)]
    return {_SAMPLE: torch.stack(kept, dim=1).flatten(0, 1).flatten(1)}


def hidden_errors(run: RunLayout, stream: str, num_blocks: int, chunks: Sequence[str]) -> tuple[float | None, ...]:
    """Return how far the hidden states behind each block of a result are from the source's.

    Args:
        run: Layout of the run directory.
        stream: Name of the stream through the result.
        num_blocks: Number of blocks.
        chunks: Names of the held-out chunks.

    Returns:
        Mean of ‖ĥ − h‖ / ‖h‖ over the kept tokens for each block; None where a sample is missing.

    Raises:
        DamagedError: A sample is not as it was written.
    """
    return tuple(_error(run, stream, index, chunks) for index in range(1, num_blocks + 1))


def _error(run: RunLayout, stream: str, index: int, chunks: Sequence[str]) -> float | None:
    ratios = []
    for chunk in chunks:
        paths = [run.sample(name, index, chunk) for name in (stream, ORIGINAL)]
        if not all(path.is_file() for path in paths):
            return None
        result, source = (load_part(path)[0][_SAMPLE].float() for path in paths)
        ratios.append((result - source).norm(dim=1) / source.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny))
    return float(torch.cat(ratios).mean()) if ratios else None
