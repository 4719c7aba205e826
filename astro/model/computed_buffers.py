"""Buffers that no file holds, such as rotary frequencies: the model's own initializers compute them.

The initializer that fills a buffer may be that of the buffer's module, or of any module around it: Falcon-H1's
`mup_vector` lies in every mixer and is filled by the model. So all of these are run, from the inside out. A buffer that
none of them fills would hold whatever was in memory before, and is refused.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from astro.errors import UnsupportedError

__all__ = ["fill_buffers"]

_INITIALIZED = "_is_hf_initialized"
"""Mark by which transformers' initializers know a tensor that they must leave alone."""


@dataclasses.dataclass(frozen=True)
class _Buffer:
    """A buffer that no file holds.

    Attributes:
        module: Module that the buffer belongs to.
        name: Name of the buffer in its module.
        full_name: Name of the buffer in the model.
    """

    module: nn.Module
    name: str
    full_name: str

    @property
    def owner(self) -> str:
        """The name of the buffer's module in the model."""
        return self.full_name.rpartition(".")[0]

    @property
    def values(self) -> torch.Tensor:
        """The tensor that is the buffer now; an initializer may put another in its place."""
        tensor = self.module._buffers[self.name]
        assert tensor is not None
        return tensor


def fill_buffers(
    model: PreTrainedModel, part: nn.Module, device: torch.device, is_unused: Callable[[str], bool] = lambda name: False
) -> None:
    """Compute the buffers of a part of a model that no file holds, where they are on the meta device.

    Args:
        model: The model.
        part: The model or one of its modules.
        device: Device that the buffers are put on.
        is_unused: Function that tells of a module's name that the module is not run; its buffers are left as they are.

    Raises:
        UnsupportedError: No initializer fills a buffer; the message names the first.
    """
    names = {module: name for name, module in model.named_modules()}
    buffers = [
        _Buffer(module, name, f"{names[module]}.{name}".removeprefix("."))
        for module in part.modules()
        if not is_unused(names[module])
        for name in sorted(module._non_persistent_buffers_set)
        if (values := module._buffers[name]) is not None and values.is_meta
    ]
    if not buffers:
        return
    for buffer in buffers:
        buffer.module._buffers[buffer.name] = torch.empty_like(buffer.values, device=device)
    owners = list(dict.fromkeys(buffer.owner for buffer in buffers))
    with torch.no_grad(), _protected(model, buffers):
        left = _unfilled(model, owners, buffers)
        # The innermost go first, as they do where transformers initializes a whole model.
        around = sorted({name for buffer in left for name in _ancestors(buffer.owner)}, key=lambda name: -len(name))
        empty = _unfilled(model, around, left)
    if empty:
        raise UnsupportedError(
            f"{type(model).__name__}: no file holds the buffer {empty[0].full_name} {list(empty[0].values.shape)}, and "
            f"no initializer of the model computes it ({len(empty)} of {len(buffers)} buffers are like that); its "
            "values would be whatever was in memory. Try another release of transformers"
        )


def _ancestors(name: str) -> list[str]:
    """Return the names of the modules around a module, the model itself last."""
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts) - 1, -1, -1)]


def _initialize(model: PreTrainedModel, name: str) -> None:
    """Run the initializer for one module: that of the innermost model around it, as parts of a model have their own."""
    around = (model.get_submodule(ancestor) for ancestor in (name, *_ancestors(name)))
    owner: Any = next((module for module in around if isinstance(module, PreTrainedModel)), model)
    owner._init_weights(model.get_submodule(name))


def _unfilled(model: PreTrainedModel, names: Sequence[str], buffers: Sequence[_Buffer]) -> list[_Buffer]:
    """Run the initializers for some modules, and return the buffers in which they leave a value as it was.

    They are run twice, with other values in the buffers before: what they compute comes out alike. NaN, with which
    floats are filled, is like nothing, so that no buffer that is refused could be mistaken for numbers.
    """
    results = []
    for before in (False, True):
        for buffer in buffers:
            buffer.values.fill_(float("nan") if buffer.values.is_floating_point() else before)
        for name in names:
            _initialize(model, name)
        results.append([buffer.values.clone() for buffer in buffers])
    return [buffer for buffer, first, second in zip(buffers, *results, strict=True) if not torch.equal(first, second)]


@contextlib.contextmanager
def _protected(model: PreTrainedModel, buffers: Sequence[_Buffer]) -> Iterator[None]:
    """Keep initializers from all tensors that are loaded, while the body of a `with` statement runs."""
    empty = {id(buffer.values) for buffer in buffers}
    marked = [
        tensor
        for tensor in (*model.parameters(), *model.buffers())
        if not tensor.is_meta and id(tensor) not in empty and not getattr(tensor, _INITIALIZED, False)
    ]
    for tensor in marked:
        setattr(tensor, _INITIALIZED, True)
    try:
        yield
    finally:
        for tensor in marked:
            delattr(tensor, _INITIALIZED)
