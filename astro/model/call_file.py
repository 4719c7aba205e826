"""The calls of all blocks in files.

One file holds what blocks are called with for all texts of one shape. What differs between texts, such as Gemma 4's
embeddings of each layer, or tokens that a router hashes, is in a file of its own for each text and block.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from astro.errors import UnsupportedError
from astro.model.block_call import BlockCall, HandedOn, SharedDict
from astro.storage.checked_tensors import load_part, read_part_note, save_part

__all__ = [
    "Recording",
    "differing_tensors",
    "load_call",
    "read_recording",
    "require_storable",
    "save_calls",
    "tensors_of",
    "with_tensors",
]


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a file of calls says of all blocks.

    Attributes:
        num_outputs: Number of values that blocks return as a tuple; 0 where they return hidden states alone.
        different: Names of the texts for which blocks are called with other tensors than the file holds.
    """

    num_outputs: int
    different: tuple[str, ...]


def save_calls(path: Path, calls: Sequence[BlockCall], num_outputs: int, different: Sequence[str] = ()) -> None:
    """Write the calls of all blocks to one safetensors file; a tensor that blocks share is stored once.

    Args:
        path: Where the file belongs.
        calls: The call of every block, in the model's order.
        num_outputs: Number of values that blocks return as a tuple.
        different: Names of the texts for which blocks are called with other tensors.

    Raises:
        UnsupportedError: An argument is neither a tensor nor plain data.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}

    def name_of(tensor: torch.Tensor, place: str) -> str:
        if id(tensor) not in names:
            names[id(tensor)] = f"t{len(names)}"
            tensors[names[id(tensor)]] = tensor.clone()
        return names[id(tensor)]

    structure = [[_encode((call.args, call.kwargs), "", name_of), call.wanted] for call in calls]
    note = {"calls": structure, "num_outputs": num_outputs, "different": list(different)}
    save_part(path, tensors, json.dumps(note))


def require_storable(calls: Sequence[BlockCall]) -> None:
    """Refuse calls that `save_calls` could not write.

    Args:
        calls: The call of every block.

    Raises:
        UnsupportedError: An argument is neither a tensor nor plain data.
    """
    for call in calls:
        _placed(call)


def read_recording(path: Path) -> Recording:
    """Read what a file of calls says of all blocks.

    Args:
        path: A file that `save_calls` wrote.
    """
    content = json.loads(read_part_note(path))
    return Recording(int(content["num_outputs"]), tuple(content["different"]))


def load_call(path: Path, index: int, device: torch.device) -> BlockCall:
    """Read the call of one block.

    Args:
        path: A file that `save_calls` wrote.
        index: Index of the block.
        device: Device of the tensors in the call.
    """
    tensors, note = load_part(path)
    encoded, wanted = json.loads(note)["calls"][index]
    args, kwargs = _decode(encoded, lambda name: tensors[name].to(device))
    return BlockCall(args, kwargs, index, tuple(wanted))


def differing_tensors(call: BlockCall, other: BlockCall) -> dict[str, torch.Tensor]:
    """Return the tensors of a call that are not those of another call, by their places among the arguments.

    Args:
        call: Call of a block for one text.
        other: Call of the same block for another text of the same shape.

    Raises:
        UnsupportedError: The calls differ in something that is no tensor.
    """
    (structure, tensors), (other_structure, other_tensors) = _placed(call), _placed(other)
    if structure != other_structure:
        raise UnsupportedError(
            f"block {call.index} of this model is called with other kinds of arguments for one text than for another "
            "of the same length; its blocks cannot be run one by one"
        )
    pairs = ((place, tensor, other_tensors[place]) for place, tensor in tensors.items())
    return {
        place: tensor for place, tensor, before in pairs if tensor is not before and not torch.equal(tensor, before)
    }


def with_tensors(call: BlockCall, tensors: Mapping[str, torch.Tensor]) -> BlockCall:
    """Return a call in which some tensors are replaced.

    Args:
        call: The call.
        tensors: Tensors by place, as `differing_tensors` returns them.
    """
    structure, before = _placed(call)
    args, kwargs = _decode(structure, (before | dict(tensors)).__getitem__)
    return BlockCall(args, kwargs, call.index, call.wanted)


def tensors_of(call: BlockCall) -> dict[str, torch.Tensor]:
    """Return the tensors of a call by their places among the arguments.

    Args:
        call: The call.
    """
    return _placed(call)[1]


def _placed(call: BlockCall) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the structure of a call, and its tensors by place."""
    tensors: dict[str, torch.Tensor] = {}

    def name_of(tensor: torch.Tensor, place: str) -> str:
        tensors[place] = tensor
        return place

    return _encode((call.args, call.kwargs), "", name_of), tensors


def _encode(value: Any, place: str, name_of: Callable[[torch.Tensor, str], str]) -> Any:
    if isinstance(value, torch.Tensor):
        return {"tensor": name_of(value, place)}
    if isinstance(value, HandedOn):
        return {"handed": [value.block, value.output]}
    if isinstance(value, SharedDict):
        return {"shared": value.number, "content": _encode(value.content, place, name_of)}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(item, f"{place}.{number}", name_of) for number, item in enumerate(value)]}
    if isinstance(value, dict):
        items = [
            [_encode(key, place, name_of), _encode(item, f"{place}.{key!r}", name_of)] for key, item in value.items()
        ]
        return {"dict": items}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise UnsupportedError(f"a block of this model takes a {type(value).__name__} argument, which cannot be kept")


def _decode(node: Any, tensor_of: Callable[[str], torch.Tensor]) -> Any:
    (kind, value), *_ = node.items()
    if kind == "tensor":
        return tensor_of(value)
    if kind == "handed":
        return HandedOn(*value)
    if kind == "shared":
        return SharedDict(value, _decode(node["content"], tensor_of))
    if kind == "dict":
        return {_decode(key, tensor_of): _decode(item, tensor_of) for key, item in value}
    if kind in ("tuple", "list"):
        items = [_decode(item, tensor_of) for item in value]
        return tuple(items) if kind == "tuple" else items
    return value
