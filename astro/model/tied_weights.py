"""Weights that a config calls tied although the checkpoint holds both, with other values: transformers keeps both."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from astro.model.skeleton import Skeleton
from astro.storage.checkpoint import Checkpoint
from astro.storage.shard_header import StoredTensor

__all__ = ["untied_weights", "without_tying"]

_NUM_RUNS = 8
_RUN_ROWS = 32
"""Rows of a run of tokens that are compared. The runs lie evenly in the vocabulary, the first and the last token among
them: tokens that were added later, at its end, may be all that differs."""
_KEY = "tie_word_embeddings"


def untied_weights(skeleton: Skeleton, checkpoint: Checkpoint, keys: Iterable[str]) -> list[str]:
    """List the model's names of weights that its class ties to others, and that are not tied in a checkpoint.

    Args:
        skeleton: The model on the meta device.
        checkpoint: Checkpoint of the model.
        keys: Names of the checkpoint tensors outside the blocks.
    """
    stored = {skeleton.target_of(key)[0]: key for key in keys}
    tied = getattr(skeleton.model, "all_tied_weights_keys", None) or {}
    pairs = [(name, stored[name], stored[other]) for name, other in tied.items() if {name, other} <= stored.keys()]
    return [name for name, key, other in pairs if not torch.equal(_sample(checkpoint, key), _sample(checkpoint, other))]


def without_tying(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that ties no embeddings. Servers go by it, and would drop the head that the file holds.

    Args:
        content: Content of config.json, or of a config within it.
    """
    inner = {key: without_tying(value) for key, value in content.items() if isinstance(value, dict) and _KEY in value}
    return {**content, **inner, _KEY: False}


def _sample(checkpoint: Checkpoint, key: str) -> torch.Tensor:
    entry = checkpoint.entries[key]
    rows = min(_RUN_ROWS, entry.shape[0])
    if not isinstance(entry, StoredTensor):  # rounded to few bits, so that all of it differs if any does
        return next(checkpoint.pieces(key, rows * entry.shape[1]))
    starts = [(entry.shape[0] - rows) * i // (_NUM_RUNS - 1) for i in range(_NUM_RUNS)]
    parts = [entry.rows_to_read(start, start + rows) for start in starts]
    checkpoint.store.fill([span for _, span in parts])
    return torch.cat([part for part, _ in parts])
