"""What every block is called with, recorded from the model's own forward, and the forward around the blocks.

The model runs once with every block replaced by a stub, which notes its arguments and returns the hidden states as they
came. Whatever else blocks return is replaced by a mark. Where the model hands a mark to another block, the value passes
from block to block; where the model computes with a mark, its blocks cannot be run one by one.
Shapes: B sequences, T tokens, H hidden size, V tokens in the vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import nn

from astro.errors import UnsupportedError
from astro.model.block_call import BlockCall, HandedOn, SharedDict, mapped
from astro.model.skeleton import Skeleton

__all__ = ["count_outputs", "record", "run_head"]


class _FirstBlockDone(Exception):
    """Ends a forward that is only needed up to its first block."""


class _Mark(torch.Tensor):
    """Stands for a value that a block returns besides hidden states. Nothing can be computed with it."""

    source: HandedOn

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UnsupportedError(
            "this model computes with what its blocks return besides hidden states, between one block and the next "
            f"({getattr(func, '__name__', func)}); its blocks cannot be run one by one"
        )


def count_outputs(skeleton: Skeleton, input_ids: torch.Tensor) -> int:
    """Return how many values blocks of this model return as a tuple; 0 where they return hidden states alone.

    Args:
        skeleton: The model, with its embeddings and its first block loaded.
        input_ids: A few tokens, int64 [B, T].
    """
    counts: list[int] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        counts.append(len(output) if isinstance(output, tuple) else 0)
        raise _FirstBlockDone

    handle = skeleton.blocks[0].register_forward_hook(note)
    try:
        with contextlib.suppress(_FirstBlockDone):
            skeleton.text_model(input_ids=input_ids, use_cache=False)
    finally:
        handle.remove()
    return counts[0]


def record(skeleton: Skeleton, input_ids: torch.Tensor, num_outputs: int) -> tuple[torch.Tensor, list[BlockCall]]:
    """Run the model around its blocks and record what every block is called with.

    Args:
        skeleton: The model, with everything outside its blocks loaded.
        input_ids: Tokens, int64 [B, T].
        num_outputs: Number of values that blocks return, see `count_outputs`.

    Returns:
        The hidden states before the first block, [B, T, H] or [B, T, lanes, H], and the call of every block.

    Raises:
        UnsupportedError: The blocks do not follow each other: the model computes something between them, calls them in
            another order, or its hidden states do not begin with sequences and tokens.
    """
    first: list[torch.Tensor] = []
    calls: list[BlockCall] = []
    numbers: dict[int, int] = {}
    alive: list[Any] = []  # a dictionary that is let go could leave its place, and its number, to another

    def described(value: Any) -> Any:
        if isinstance(value, _Mark):
            return value.source
        if isinstance(value, MutableMapping):
            alive.append(value)
            number = numbers.setdefault(id(value), len(numbers))
            return SharedDict(number, {key: described(item) for key, item in value.items()})
        if isinstance(value, tuple | list):
            items = [described(item) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        return value

    def stub(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, rest, named = _split(args, kwargs)
        if not first:
            first.append(hidden)
        if index != len(calls):
            raise _refusal(skeleton, f"calls block {index} where block {len(calls)} would follow")
        if hidden is not first[0] and not torch.equal(hidden, first[0]):
            raise _refusal(skeleton, f"changes the hidden states between block {index - 1} and block {index}")
        calls.append(BlockCall(described(rest), {key: described(item) for key, item in named.items()}, index))
        return _output(hidden, index, num_outputs)

    with _blocks_replaced(skeleton, stub):
        skeleton.text_model.base_model(input_ids=input_ids, use_cache=False)
    if len(calls) != len(skeleton.blocks):
        raise _refusal(skeleton, f"calls {len(calls)} of its {len(skeleton.blocks)} blocks")
    if first[0].shape[:2] != input_ids.shape:
        raise _refusal(skeleton, f"has hidden states {list(first[0].shape)} for {list(input_ids.shape)} tokens")
    return first[0], _with_wanted(calls)


def run_head(skeleton: Skeleton, input_ids: torch.Tensor, hidden: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """Return the logits [B, T, V] that follow from the last block's output.

    Args:
        skeleton: The model, with everything outside its blocks loaded.
        input_ids: Tokens that the hidden states came from, int64 [B, T].
        hidden: Output of the last block, [B, T, H] or [B, T, lanes, H].
        num_outputs: Number of values that blocks return, see `count_outputs`.
    """

    def stub(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _output(hidden, index, num_outputs)

    with _blocks_replaced(skeleton, stub):
        logits: torch.Tensor = skeleton.text_model(input_ids=input_ids, use_cache=False).logits
    return logits


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    if "hidden_states" not in kwargs:
        raise UnsupportedError(f"blocks of this model are not called with hidden states, but with {sorted(kwargs)}")
    return kwargs["hidden_states"], (), {key: value for key, value in kwargs.items() if key != "hidden_states"}


def _output(hidden: torch.Tensor, index: int, num_outputs: int) -> Any:
    """Return what a block returns, marks in place of everything but the hidden states."""
    if not num_outputs:
        return hidden
    marks = []
    for place in range(1, num_outputs):
        mark = torch.empty(0).as_subclass(_Mark)
        mark.source = HandedOn(index, place)
        marks.append(mark)
    return (hidden, *marks)


def _with_wanted(calls: list[BlockCall]) -> list[BlockCall]:
    """Add to each call what blocks behind it are called with."""
    wanted: dict[str, None] = {}
    complete: list[BlockCall] = []

    def note(value: Any) -> None:
        if isinstance(value, HandedOn | SharedDict):
            wanted.setdefault(value.name)

    for call in reversed(calls):
        complete.append(BlockCall(call.args, call.kwargs, call.index, tuple(sorted(wanted))))
        mapped((call.args, call.kwargs), note)
    return complete[::-1]


def _refusal(skeleton: Skeleton, what: str) -> UnsupportedError:
    return UnsupportedError(f"{type(skeleton.model).__name__} {what}; its blocks cannot be run one by one")


@contextlib.contextmanager
def _blocks_replaced(
    skeleton: Skeleton, forward: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
) -> Iterator[None]:
    # Only `forward` is replaced: models read other attributes of their blocks, such as the type of attention.
    for index, block in enumerate(skeleton.blocks):
        block.forward = lambda *args, _index=index, **kwargs: forward(_index, args, kwargs)
    try:
        yield
    finally:
        for block in skeleton.blocks:
            del block.forward
