"""Check all weights of a checkpoint, and say how far that is."""

from collections.abc import Collection

from astro.storage.checkpoint import Checkpoint, require_finite
from astro_dist.source.long_wait import LongWait

__all__ = ["check_weights"]


def check_weights(checkpoint: Checkpoint, unused: Collection[str]) -> list[str]:
    """Read every float tensor once, and refuse NaN and Inf.

    Args:
        checkpoint: The checkpoint that is read.
        unused: Names of the tensors that the model does not read.

    Returns:
        Names of the unused tensors that are not finite.

    Raises:
        CheckpointError: A tensor that the model reads is not finite; the message names the first.
    """
    total = sum(entry.size_bytes for entry in checkpoint.entries.values())
    wait = LongWait(f"{checkpoint.store}: checked for NaN", total / 1e9, "GB")
    return require_finite(checkpoint, unused, lambda size_bytes: wait.advanced(size_bytes / 1e9))
