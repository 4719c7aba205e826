"""The call of a transformer block, and what passes from block to block.

Masks, rotary embeddings, positions and their order differ between architectures, and so does what blocks hand to later
blocks besides the hidden states: values that they return and the model hands on (the chosen tokens of a shared indexer,
in GLM-5), or entries of a dictionary that all blocks get (keys and values that layers share, in Gemma 4). This module
knows none of them; `recording` finds out what a block is called with.
Shapes: B sequences, T tokens, H hidden size. Hidden states are [B, T, H]; with hyper-connections [B, T, lanes, H].
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from astro.errors import UnsupportedError
from astro.model.attention import saved_memory

__all__ = ["BlockCall", "BlockState", "HandedOn", "SharedDict", "forward", "mapped"]


@dataclasses.dataclass(frozen=True)
class HandedOn:
    """An argument that a block before returned.

    Attributes:
        block: Index of the block that returned it.
        output: Place of the value in the tuple that the block returned; the hidden states are at 0.
    """

    block: int
    output: int

    @property
    def name(self) -> str:
        """Name of the value among those that pass from block to block."""
        return f"output.{self.block}.{self.output}"


@dataclasses.dataclass(frozen=True)
class SharedDict:
    """An argument that is a dictionary, into which blocks may write what later blocks read.

    Attributes:
        number: Number of the dictionary; blocks that get the same one share a number.
        content: What the model itself put into it.
    """

    number: int
    content: dict[Any, Any]

    @property
    def name(self) -> str:
        """What the names of entries begin with that pass from block to block."""
        return f"dict.{self.number}"


@dataclasses.dataclass(frozen=True)
class BlockCall:
    """The arguments of one block besides the hidden states.

    Attributes:
        args: Positional arguments after the hidden states. `HandedOn` and `SharedDict` stand for what passes from block
            to block.
        kwargs: Keyword arguments.
        index: Index of the block.
        wanted: Names of the values, and of the dictionaries, that blocks behind this one are called with.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int = 0
    wanted: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class BlockState:
    """What passes from one block to the next, or the gradient of the loss with respect to it.

    Attributes:
        hidden: Hidden states, [B, T, H] or [B, T, lanes, H].
        others: Other tensors by name; None is left out.
    """

    hidden: torch.Tensor
    others: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def to(self, device: torch.device) -> "BlockState":
        """Return the same on a device.

        Args:
            device: The device.
        """
        return BlockState(self.hidden.to(device), {name: other.to(device) for name, other in self.others.items()})


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a structure of tuples, lists and dictionaries in which everything else is changed.

    Args:
        value: The structure.
        change: Function that returns what takes the place of a value.
    """
    if isinstance(value, tuple | list):
        items = [mapped(item, change) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    return change(value)


def forward(block: nn.Module, state: BlockState, call: BlockCall) -> BlockState:
    """Return what a block makes of the state before it.

    Args:
        block: The block, which is loaded.
        state: State before the block.
        call: The other arguments of the block.

    Raises:
        UnsupportedError: The block hands something on that is no tensor.
    """
    shared: dict[str, tuple[dict[Any, Any], dict[Any, Any]]] = {}

    def fill(value: Any) -> Any:
        if isinstance(value, HandedOn):
            return state.others.get(value.name)
        if isinstance(value, SharedDict):
            if value.name not in shared:
                before = mapped(value.content, fill) | _entries(value.name, state.others)
                shared[value.name] = before, dict(before)
            return shared[value.name][1]
        return value

    args, kwargs = mapped((call.args, call.kwargs), fill)
    with saved_memory(state.hidden):
        output = block(state.hidden, *args, **kwargs)
    others = dict(state.others)
    if isinstance(output, tuple):
        returned = {HandedOn(call.index, place).name: value for place, value in enumerate(output) if place}
        others |= {name: _tensor(name, returned[name]) for name in call.wanted if returned.get(name) is not None}
    for name, (before, after) in shared.items():
        for key, value in after.items():
            if key not in before or before[key] is not value:
                others |= _flat(f"{name}.{json.dumps(key)}", value)
    passed = {name: other for name, other in others.items() if any(_is_part(name, wanted) for wanted in call.wanted)}
    return BlockState(output[0] if isinstance(output, tuple) else output, passed)


def _is_part(name: str, whole: str) -> bool:
    return name == whole or name.startswith(f"{whole}.")


def _flat(name: str, value: Any) -> dict[str, torch.Tensor]:
    """Return an entry of a dictionary, which is a tensor or a tuple of tensors, as tensors by name."""
    if isinstance(value, tuple | list):
        return {f"{name}/{place}": _tensor(name, item) for place, item in enumerate(value)}
    return {name: _tensor(name, value)}


def _entries(name: str, others: Mapping[str, torch.Tensor]) -> dict[Any, Any]:
    """Return the entries of a dictionary that blocks before wrote, tuples as tuples."""
    entries: dict[Any, torch.Tensor] = {}
    tuples: dict[Any, dict[int, torch.Tensor]] = {}
    decoder = json.JSONDecoder()
    for full_name, tensor in others.items():
        if _is_part(full_name, name):
            key, end = decoder.raw_decode(full_name, len(name) + 1)
            if end == len(full_name):
                entries[key] = tensor
            else:
                tuples.setdefault(key, {})[int(full_name[end + 1 :])] = tensor
    # Files hold tensors in the order of their names, in which 10 comes before 2.
    return entries | {key: tuple(items[place] for place in sorted(items)) for key, items in tuples.items()}


def _tensor(name: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise UnsupportedError(
            f"a block of this model hands on a {type(value).__name__} ({name}); only tensors, and tuples of them, can "
            "be kept from block to block"
        )
    return value
