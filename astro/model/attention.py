"""Attention on GPUs in memory that grows with the number of tokens, not with its square.

torch has several kernels for attention. The one that is left where no other fits, called math, holds the score of every
token with every other: B · heads · T² numbers, in a backward pass several times. Two things make it needless here:

- The kernel for float32, called efficient, takes no grouped heads (fewer keys and values than queries). Where a model
  has such, each key and value is repeated for its queries, which is small beside all scores.
- Backward passes of the kernels that save memory add parts up in any order. They keep to one order only where
  nondeterministic operations raise errors, not where torch only warns of them; and then other operations of a block
  would raise. So errors are switched on for the backward pass of attention alone.

Shapes: B sequences, T tokens, D numbers of a head.
"""

import contextlib
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["saved_memory"]


def saved_memory(hidden: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which attention saves memory, where that asks for something.

    Args:
        hidden: The hidden states that attention is for, whose device and dtype decide.
    """
    needed = hidden.is_cuda and (hidden.dtype == torch.float32 or torch.is_grad_enabled())
    return SavingAttention() if needed else contextlib.nullcontext()


class SavingAttention(TorchFunctionMode):
    """Hands attention to kernels that save memory, and their backward passes keep to one order; see this module."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        args, kwargs = _with_all_heads(args, kwargs)
        output = func(*args, **kwargs)
        if output.grad_fn is not None and torch.are_deterministic_algorithms_enabled():
            node = _node_of_attention(output.grad_fn)
            node.register_prehook(lambda *_: torch.use_deterministic_algorithms(True))
            node.register_hook(lambda *_: torch.use_deterministic_algorithms(True, warn_only=True))
        return output


def _node_of_attention(last: Any) -> Any:
    """Return the node whose backward pass is that of attention; the last one where no kernel of its own was taken.

    Kernels that want heads of a multiple of 8 numbers are given padded ones, and what was padded is cut off behind.
    """
    node = last
    while node is not None and "Attention" not in node.name():
        node = node.next_functions[0][0] if node.next_functions else None
    return last if node is None else node


def _with_all_heads(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of float32 attention with a key and a value [B, heads, T, D] for each query's head."""
    tensors = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    query = tensors["query"]
    if not tensors.pop("enable_gqa", False) or query.dtype != torch.float32:
        return args, kwargs
    for name in ("key", "value"):
        tensors[name] = tensors[name].repeat_interleave(query.shape[-3] // tensors[name].shape[-3], dim=-3)
    rest = dict(zip(("attn_mask", "dropout_p", "is_causal"), args[3:], strict=False))
    return (), tensors | rest
