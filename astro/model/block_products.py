"""Every product of activations with a weight of a block, as the block's own forward comes to it.

`activations` sees the layers that are quantized. This sees all weights: routers, gates and layers that stay as they are
multiply the same activations. A weight is recognized by where it lies in memory. Products that are written in another
way (`einsum`, convolutions) are not seen. Shapes: T tokens, C columns, R rows, E experts.
"""

import bisect
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from astro.model.torch_products import PRODUCTS, Argument

__all__ = ["BlockProducts", "Product"]


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of activations with a weight of a block.

    Attributes:
        parameter: Name of the parameter that holds the weight.
        expert: Index of the expert whose weight it is; None outside experts, and where all of them are multiplied.
        axis: Axis of the parameter along which the input's channels lie.
        bias: Name of the parameter that is added in the same operation; None where there is none.
        X: Inputs [..., C].
    """

    parameter: str
    expert: int | None
    axis: int
    bias: str | None
    X: torch.Tensor

    @property
    def place(self) -> tuple[str, int | None, int]:
        """Return what tells the weight from others."""
        return self.parameter, self.expert, self.axis


class BlockProducts(TorchFunctionMode):
    """Lets a function see, and change, what a block's weights are multiplied with and what comes of it."""

    def __init__(
        self,
        block: nn.Module,
        on_input: Callable[[Product], torch.Tensor],
        on_output: Callable[[Product, torch.Tensor], torch.Tensor] = lambda product, Y: Y,
    ) -> None:
        """Look at the weights of a block.

        Args:
            block: The block, which is loaded.
            on_input: Function that gets each product and returns the input that takes the place of its own.
            on_output: Function that gets each product and its result, and returns what takes the place of the result.
        """
        super().__init__()
        parameters = sorted((p.data_ptr(), name, p.detach()) for name, p in block.named_parameters() if p.numel())
        self._starts = [start for start, _, _ in parameters]
        self._parameters = [(name, parameter) for _, name, parameter in parameters]
        self._on_input, self._on_output = on_input, on_output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        places = PRODUCTS.get(getattr(func, "__name__", ""))
        if places is None:
            return func(*args, **kwargs)
        arguments = list(args)
        X, weight, bias = (_argument(arguments, kwargs, place) for place in places)
        product = self._product(X, weight, bias, -1 if places is PRODUCTS["linear"] else -2)
        if product is None:
            return func(*args, **kwargs)
        position, name = places[0]
        holder: Any = arguments if position < len(arguments) else kwargs
        holder[position if position < len(arguments) else name] = self._on_input(product)
        return self._on_output(product, func(*arguments, **kwargs))

    def _product(self, X: Any, weight: Any, bias: Any, contracted: int) -> Product | None:
        """The product that a call computes; None where its second factor is no weight of the block."""
        if not isinstance(weight, torch.Tensor) or weight.ndim < 2:
            return None
        named = self._parameter_at(weight)
        if named is None:
            return None
        name, parameter = named
        size, stride = weight.shape[contracted], weight.stride(contracted)
        axes = [a for a in range(parameter.ndim) if parameter.stride(a) == stride and parameter.shape[a] == size]
        if not axes:
            return None
        expert = None
        if parameter.ndim == 3 and weight.ndim == 2:
            offset = (weight.data_ptr() - parameter.data_ptr()) // parameter.element_size()
            expert = offset // parameter.stride(0)
        added = self._parameter_at(bias) if isinstance(bias, torch.Tensor) else None
        return Product(name, expert, axes[-1], added[0] if added else None, X)

    def _parameter_at(self, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """The parameter in whose memory a tensor lies, with its name."""
        index = bisect.bisect_right(self._starts, tensor.data_ptr()) - 1
        if index < 0:
            return None
        name, parameter = self._parameters[index]
        is_inside = tensor.data_ptr() < parameter.data_ptr() + parameter.numel() * parameter.element_size()
        return (name, parameter) if is_inside and tensor.dtype == parameter.dtype else None


def _argument(arguments: list[Any], kwargs: Mapping[str, Any], place: Argument | None) -> Any:
    if place is None:
        return None
    position, name = place
    return arguments[position] if position < len(arguments) else kwargs.get(name)
