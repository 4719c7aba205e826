"""Weights that a config calls tied although the checkpoint holds both, with other values: transformers keeps both."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from astro.model.skeleton import Skeleton
from astro.storage.checkpoint import Checkpoint

__all__ = ["untied_weights", "without_tying"]

_SAMPLE = 1 << 16
"""Values that are compared: those of the first tokens of the vocabulary."""
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
    return [name for name, key, other in pairs if not _begin_alike(checkpoint, key, other)]


def without_tying(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that ties no embeddings. Servers go by it, and would drop the head that the file holds.

    Args:
        content: Content of config.json, or of a config within it.
    """
    inner = {key: without_tying(value) for key, value in content.items() if isinstance(value, dict) and _KEY in value}
    return {**content, **inner, _KEY: False}


def _begin_alike(checkpoint: Checkpoint, key: str, other: str) -> bool:
    first, second = (next(checkpoint.pieces(name, _SAMPLE)) for name in (key, other))
    return torch.equal(first, second)
