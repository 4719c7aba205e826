"""Count which weights of a checkpoint are quantized, and what the others belong to."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from astro.model.linear_layer import LinearLayer
from astro.model.skeleton import Skeleton
from astro.storage.checkpoint import Checkpoint
from astro_dist.planning.coverage import MULTI_TOKEN, Coverage

__all__ = ["coverage_of", "is_multi_token"]

_HEAD, _BESIDE, _OTHER = "embeddings, norm and head", "towers for other inputs than text", "tensors of no known part"
_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_MULTI_TOKEN_NAME = re.compile(r"(^|[._])(mtp|nextn)([._]|$)")
_MULTI_TOKEN_KEY = re.compile(r"nextn|mtp")
"""What the keys of config.json have in their names that count layers for multi-token prediction."""


def coverage_of(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    blocks: Iterable[tuple[Sequence[str], Sequence[LinearLayer]]],
    copied: Iterable[str],
) -> Coverage:
    """Count what is quantized and what is left.

    Args:
        checkpoint: Opened checkpoint of the source.
        skeleton: The model on the meta device.
        blocks: Names of all tensors of each block, and its layers that are quantized.
        copied: Names of the tensors outside the blocks.
    """
    left: Counter[str] = Counter()
    quantized = in_blocks = 0
    for keys, layers in blocks:
        replaced = {layer.key for layer in layers}
        quantized += sum(layer.rows * layer.columns for layer in layers)
        in_blocks += sum(_count(checkpoint, key) for key in keys)
        for key in keys:
            if key not in replaced:
                left[_kind(skeleton, key)] += _count(checkpoint, key)
    parts: Counter[str] = Counter()
    for key in copied:
        parts[_part(skeleton, key)] += checkpoint.entries[key].size_bytes
    return Coverage(quantized, in_blocks, dict(left), dict(parts))


def is_multi_token(skeleton: Skeleton, key: str) -> bool:
    """Tell whether a tensor that the model does not have belongs to layers that predict several tokens at once.

    They have a name of their own, or lie behind the last block, as one more block, where config.json counts them.

    Args:
        skeleton: The model on the meta device.
        key: Name of the checkpoint tensor.
    """
    if _MULTI_TOKEN_NAME.search(key):
        return True
    name = skeleton.target_of(key)[0]
    head, _, tail = name.partition(f"{skeleton.blocks_name}.")
    index = tail.split(".", 1)[0]
    is_behind = not head and index.isdigit() and int(index) >= len(skeleton.blocks)
    return is_behind and _counts_multi_token(skeleton)


def _counts_multi_token(skeleton: Skeleton) -> bool:
    """Tell whether config.json says that there are such layers, as `num_nextn_predict_layers` does."""
    content: dict[str, Any] = skeleton.model.config.get_text_config().to_dict()
    return any(value for name, value in content.items() if _MULTI_TOKEN_KEY.search(name))


def _part(skeleton: Skeleton, key: str) -> str:
    target = skeleton.target_of(key)[0]
    if skeleton.is_beside_text(target):
        return _BESIDE
    if skeleton.shape_of(target) is not None:
        return _HEAD
    return MULTI_TOKEN if is_multi_token(skeleton, key) else _OTHER


def _kind(skeleton: Skeleton, key: str) -> str:
    name = skeleton.target_of(key)[0].removeprefix(f"{skeleton.blocks_name}.").partition(".")[2]
    return _NUMBER.sub("", name).removesuffix(".weight")


def _count(checkpoint: Checkpoint, key: str) -> int:
    return math.prod(checkpoint.entries[key].shape)
