"""The arguments of a transformer block besides hidden states: recorded from the model's own forward, kept in a file.

Masks, rotary embeddings, positions and their order differ between architectures. This module knows none of them: it
runs the model's own forward once with every block replaced by a stub, which notes its arguments and returns the hidden
states as they came. Shapes: B sequences, T tokens, H hidden size, V tokens in the vocabulary.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from astro.errors import UnsupportedError
from astro.model.skeleton import Skeleton
from astro.storage.checked_tensors import load_part, save_part

__all__ = ["BlockCall", "forward", "load_call", "record", "returns_tuple", "run_head", "save_calls"]


@dataclasses.dataclass(frozen=True)
class BlockCall:
    """The arguments of one block besides the hidden states.

    Attributes:
        args: Positional arguments after the hidden states.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _FirstBlockDone(Exception):
    """Ends a forward that is only needed up to its first block."""


def returns_tuple(skeleton: Skeleton, input_ids: torch.Tensor) -> bool:
    """Tell whether blocks of this model return a tuple.

    Args:
        skeleton: The model, with its embeddings and its first block loaded.
        input_ids: A few tokens, int64 [B, T].
    """
    is_tuple: list[bool] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        is_tuple.append(isinstance(output, tuple))
        raise _FirstBlockDone

    handle = skeleton.blocks[0].register_forward_hook(note)
    try:
        with contextlib.suppress(_FirstBlockDone):
            skeleton.text_model(input_ids=input_ids, use_cache=False)
    finally:
        handle.remove()
    return is_tuple[0]


def record(skeleton: Skeleton, input_ids: torch.Tensor, as_tuple: bool) -> tuple[torch.Tensor, list[BlockCall]]:
    """Run the model around its blocks and record what every block is called with.

    Args:
        skeleton: The model, with everything outside its blocks loaded.
        input_ids: Tokens, int64 [B, T].
        as_tuple: Whether blocks return a tuple.

    Returns:
        The hidden states [B, T, H] before the first block, and the call of every block.
    """
    first: list[torch.Tensor] = []
    calls: list[BlockCall] = []

    def stub(*args: Any, **kwargs: Any) -> Any:
        hidden, call = _split(args, kwargs)
        first.append(hidden) if not first else None
        calls.append(call)
        return (hidden,) if as_tuple else hidden

    with _blocks_replaced(skeleton.blocks, stub):
        skeleton.text_model.base_model(input_ids=input_ids, use_cache=False)
    return first[0], calls


def run_head(skeleton: Skeleton, input_ids: torch.Tensor, hidden: torch.Tensor, as_tuple: bool) -> torch.Tensor:
    """Return the logits [B, T, V] that follow from the last block's output.

    Args:
        skeleton: The model, with everything outside its blocks loaded.
        input_ids: Tokens that the hidden states came from, int64 [B, T].
        hidden: Output of the last block [B, T, H].
        as_tuple: Whether blocks return a tuple.
    """

    def stub(*args: Any, **kwargs: Any) -> Any:
        return (hidden,) if as_tuple else hidden

    with _blocks_replaced(skeleton.blocks, stub):
        logits: torch.Tensor = skeleton.text_model(input_ids=input_ids, use_cache=False).logits
    return logits


def save_calls(path: Path, calls: Sequence[BlockCall], as_tuple: bool) -> None:
    """Write the calls of all blocks to one safetensors file; a tensor that blocks share is stored once.

    Args:
        path: Where the file belongs.
        calls: The call of every block, in the model's order.
        as_tuple: Whether blocks return a tuple.

    Raises:
        UnsupportedError: An argument is neither a tensor nor plain data.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}

    def encode(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in names:
                names[id(value)] = f"t{len(names)}"
                tensors[names[id(value)]] = value.clone()
            return {"tensor": names[id(value)]}
        if isinstance(value, tuple | list):
            return {"tuple" if isinstance(value, tuple) else "list": [encode(item) for item in value]}
        if isinstance(value, dict):
            return {"dict": {key: encode(item) for key, item in value.items()}}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        raise UnsupportedError(f"a block of this model takes a {type(value).__name__} argument, which cannot be kept")

    structure = [encode((call.args, call.kwargs)) for call in calls]
    save_part(path, tensors, json.dumps({"calls": structure, "as_tuple": as_tuple}))


def load_call(path: Path, index: int, device: torch.device) -> tuple[BlockCall, bool]:
    """Read the call of one block.

    Args:
        path: A file that `save_calls` wrote.
        index: Index of the block.
        device: Device of the tensors in the call.

    Returns:
        The call, and whether blocks return a tuple.
    """
    tensors, note = load_part(path)
    content = json.loads(note)

    def decode(node: Any) -> Any:
        (kind, value), *_ = node.items()
        if kind == "tensor":
            return tensors[value].to(device)
        if kind == "dict":
            return {key: decode(item) for key, item in value.items()}
        if kind in ("tuple", "list"):
            items = [decode(item) for item in value]
            return tuple(items) if kind == "tuple" else items
        return value

    args, kwargs = decode(content["calls"][index])
    return BlockCall(args, kwargs), bool(content["as_tuple"])


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, BlockCall]:
    if args:
        return args[0], BlockCall(args[1:], kwargs)
    return kwargs["hidden_states"], BlockCall((), {k: v for k, v in kwargs.items() if k != "hidden_states"})


@contextlib.contextmanager
def _blocks_replaced(blocks: Sequence[nn.Module] | nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    # Only `forward` is replaced: models read other attributes of their blocks, such as the type of attention.
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def forward(block: nn.Module, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
    """Return the hidden states [B, T, H] that a block makes of others.

    Args:
        block: The block, which is loaded.
        hidden: Hidden states before the block [B, T, H].
        call: The other arguments of the block.
    """
    output = block(hidden, *call.args, **call.kwargs)
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result
