"""Gradients at the weights of a block's layers, each of which is let go of as soon as it has been seen.

Experts of a layer lie in one parameter, of which a forward takes one after the other. Autograd would fill a gradient as
large as the whole parameter for each of them. So an expert's weight is handed out as a leaf of its own, which has the
parameter's memory. A product with all experts at once has the gradient of the parameter.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from astro.model.linear_layer import LinearLayer

__all__ = ["GradientNote", "differentiated"]

GradientNote = Callable[[str, torch.Tensor], None]
"""A function that is called with the name of a layer and the gradient at its weight [R, C]."""


@contextlib.contextmanager
def differentiated(
    parameters: Mapping[str, nn.Parameter], layers: Iterable[LinearLayer], note: GradientNote
) -> Iterator[None]:
    """Let weights have gradients while the body of a `with` statement runs.

    Args:
        parameters: The parameters of the layers by name.
        layers: The layers.
        note: The function that is called for every layer that a backward pass reaches.
    """
    members: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        members.setdefault(layer.parameter, []).append(layer)
    handles = []
    try:
        for name, of_parameter in members.items():
            parameters[name].requires_grad_(True)
            see = partial(_see, of_parameter, LinearLayer.view, note)
            handles.append(parameters[name].register_post_accumulate_grad_hook(see))
        with _Experts({id(parameters[name]): of_parameter for name, of_parameter in members.items()}, note):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for name in members:
            parameters[name].requires_grad_(False).grad = None


def _see(
    layers: Iterable[LinearLayer],
    view: Callable[[LinearLayer, torch.Tensor], torch.Tensor],
    note: GradientNote,
    leaf: torch.Tensor,
) -> None:
    """Pass the gradient of a leaf on to the layers in it, and let go of it."""
    assert leaf.grad is not None
    for layer in layers:
        note(layer.name, view(layer, leaf.grad))
    leaf.grad = None


class _Experts(TorchFunctionMode):
    """Hands out the weight of an expert as a leaf of its own."""

    def __init__(self, layers: Mapping[int, list[LinearLayer]], note: GradientNote) -> None:
        super().__init__()
        self._layers, self._note = layers, note
        self._leaves: dict[tuple[int, int], torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__getitem__" and _is_expert(*args) and id(args[0]) in self._layers:
            return self._leaf(args[0], int(args[1]))
        return func(*args, **(kwargs or {}))

    def _leaf(self, parameter: torch.Tensor, expert: int) -> torch.Tensor:
        if (id(parameter), expert) not in self._leaves:
            leaf = parameter.detach()[expert].requires_grad_(True)
            members = [layer for layer in self._layers[id(parameter)] if layer.expert == expert]
            leaf.register_post_accumulate_grad_hook(partial(_see, members, LinearLayer.view_in_expert, self._note))
            self._leaves[id(parameter), expert] = leaf
        return self._leaves[id(parameter), expert]


def _is_expert(source: Any, index: Any = None, *_: Any) -> bool:
    """Tell whether one of several matrices is picked by its number."""
    is_number = isinstance(index, int) or (isinstance(index, torch.Tensor) and index.ndim == 0)
    return isinstance(source, nn.Parameter) and source.ndim == 3 and is_number
