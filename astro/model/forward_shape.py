"""What of a model decides how much memory a forward of its blocks takes beside the inputs of its layers.

Two things of transformers can take more than all else together. Where a class has no support for torch's fused
attention, the scores of all tokens with all tokens are held for every head. And where a class runs every expert on
every token, it holds the activations of all of them.
"""

import dataclasses
import inspect
from typing import Any

from torch import nn

from astro.model.experts import num_experts
from astro.model.head_counts import head_counts
from astro.model.skeleton import Skeleton

__all__ = ["ForwardShape", "forward_shape"]

_WINDOWS = ("sliding_window", "attention_chunk_size")
"""What configs call the number of tokens that attention looks back at most."""


@dataclasses.dataclass(frozen=True)
class ForwardShape:
    """Sizes that a forward's memory depends on; 0 where the model has nothing of the kind.

    Attributes:
        heads: Number of heads of attention.
        window: Tokens that attention looks back at most in some blocks; 0 where it looks at all.
        is_eager: Whether attention holds its scores, because the class has no fused one.
        has_sinks: Whether an eager attention holds its scores once more, with a sink beside them.
        dense_experts: Number of experts that are all run on every token.
        dense_width: Elements that are held at the peak for each token and each of these experts.
    """

    heads: int = 0
    window: int = 0
    is_eager: bool = False
    has_sinks: bool = False
    dense_experts: int = 0
    dense_width: int = 0


def forward_shape(skeleton: Skeleton) -> ForwardShape:
    """Read off a model what a forward of its blocks holds.

    Args:
        skeleton: The model, on the meta device.
    """
    config = skeleton.text_model.config.get_text_config()
    modules = [module for block in skeleton.blocks for module in block.modules()]
    experts, width = max((_dense_experts(module, skeleton.hidden_size) for module in modules), default=(0, 0))
    windows = [getattr(config, key, None) for key in _WINDOWS]
    return ForwardShape(
        heads=max(head_counts(config).attention, default=0),
        window=min((_most(window) for window in windows if window), default=0),
        is_eager=getattr(config, "_attn_implementation", None) == "eager",
        has_sinks=any("sinks" in module._parameters for module in modules),
        dense_experts=experts,
        dense_width=width,
    )


def _most(value: Any) -> int:
    """Return a number of the config, the largest where there is one for each block."""
    return int(max(value)) if isinstance(value, list | tuple) else int(value)


def _dense_experts(module: nn.Module, hidden: int) -> tuple[int, int]:
    """Return how many experts a module runs on every token, and the elements that it holds for each of these pairs.

    A module that is not told which tokens go to which expert has a row of inputs for every pair of both. Beside this
    row it holds what gate and up give, the activated gate, and the product of both.

    Args:
        module: A module of a block.
        hidden: Width of the hidden states.
    """
    weights = dict(module.named_parameters(recurse=False))
    if "down_proj" not in weights or not num_experts(module) or len(inspect.signature(module.forward).parameters) > 1:
        return 0, 0
    experts, *sizes = weights["down_proj"].shape
    inner = sizes[0] if sizes[1] == hidden else sizes[1]
    return experts, hidden + 4 * inner
