"""The activations that a block's layers multiply with their weights, observed in the block's own forward.

A layer is recognized by where its weight lies in memory, whatever module or loop multiplies with it: linear layers, the
experts of a layer one after the other, or all of them in one batched product. Shapes: T tokens, C columns, E experts.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from astro.model.linear_layer import LinearLayer
from astro.model.operands import Inputs, Operand, Places, is_same_input, product_of
from astro.model.weight_gradients import GradientNote, differentiated

__all__ = ["BlockLayers"]


Note = Callable[[Operand, Inputs], None]
"""A function that is called with an operand and the inputs that it is multiplied with."""
ProductNote = Callable[[Operand, Inputs, torch.Tensor], None]
"""A function that is called with an operand, its inputs, and their product [..., R]."""


class BlockLayers:
    """The linear layers of a block that is loaded: their weights, and what they are multiplied with.

    Attributes:
        operands: Every operand of the block, in the model's order.
        by_name: The operand of each layer by the layer's name.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LinearLayer]) -> None:
        """Look at some layers of one block.

        Args:
            model: The model that the block belongs to.
            layers: The layers of the block, in the model's order.
        """
        self._model = model
        self._layers = {layer.name: layer for layer in layers}
        by_weight: dict[tuple[str, int | None], list[LinearLayer]] = {}
        for layer in layers:
            by_weight.setdefault((layer.parameter, layer.expert), []).append(layer)
        self.operands = tuple(
            Operand(tuple(x.name for x in members), parameter, expert, members[0].columns, members[0].clips)
            for (parameter, expert), members in by_weight.items()
        )
        self.by_name = {name: operand for operand in self.operands for name in operand.names}

    def weight(self, name: str) -> torch.Tensor:
        """Return a layer's weight [rows, columns] as it is loaded, without a copy.

        Args:
            name: Name of the layer.
        """
        layer = self._layers[name]
        return layer.view(self._model.get_parameter(layer.parameter).detach())

    def module_of(self, operand: Operand) -> nn.Module:
        """Return the module that an operand's parameter belongs to.

        Args:
            operand: The operand.
        """
        return self._model.get_submodule(operand.parameter.rpartition(".")[0])

    def owner_of(self, operand: Operand) -> nn.Module:
        """Return the module around `module_of`: around experts it is the mixture that routes to them.

        Args:
            operand: The operand.
        """
        return self._model.get_submodule(operand.parameter.rpartition(".")[0].rpartition(".")[0])

    def observed(self, note: Note) -> "_Observation":
        """Return a context in which a function sees every operand and its inputs, before each product.

        Args:
            note: The function that is called.
        """
        return _Observation(self.places(), note)

    def observed_products(self, note: ProductNote) -> "_Observation":
        """Return a context in which a function sees every operand outside batched experts after each product.

        Args:
            note: The function that is called.
        """
        return _Observation(self.places(), None, note)

    def places(self) -> Places:
        """Return the operands by the place and the dimensions of the weight that they are multiplied with."""
        places: dict[tuple[int, int], list[Operand]] = {}
        for operand in self.operands:
            parameter = self._model.get_parameter(operand.parameter)
            weight = parameter if operand.expert is None else parameter[operand.expert]
            places[weight.data_ptr(), weight.ndim] = [operand]
            if operand.expert is not None:
                places.setdefault((parameter.data_ptr(), parameter.ndim), []).append(operand)
        return places

    @contextlib.contextmanager
    def replaced(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Put other weights into some layers while the body of a `with` statement runs.

        Args:
            weights: Weights [rows, columns] by the layer's name.
        """
        kept: dict[str, torch.Tensor] = {}
        try:
            for name, weight in weights.items():
                kept[name] = self._exchange(name, weight)
            yield
        finally:
            for name, weight in kept.items():
                self._exchange(name, weight)

    def differentiated(self, note: GradientNote) -> AbstractContextManager[None]:
        """Return a context in which the layers' weights have gradients; nothing of these is left behind it.

        Args:
            note: Function that is called for every layer that a backward pass reaches.
        """
        names = {layer.parameter for layer in self._layers.values()}
        parameters = {name: self._model.get_parameter(name) for name in names}
        return differentiated(parameters, self._layers.values(), note)

    def _exchange(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Put a weight into a layer and return the weight before. Nothing is copied where it is a whole parameter."""
        layer = self._layers[name]
        parameter = self._model.get_parameter(layer.parameter)
        if layer.expert is None and not layer.transposed:
            kept, parameter.data = parameter.data, weight
            return kept
        view = layer.view(parameter.detach())
        before = view.clone()
        view.copy_(weight)
        return before


class _Observation(TorchFunctionMode):
    def __init__(
        self,
        places: Places,
        note: Note | None,
        note_product: ProductNote | None = None,
    ) -> None:
        super().__init__()
        self._places, self._note, self._note_product = places, note, note_product
        self._gathered: Inputs | None = None
        self._routed: dict[int, torch.Tensor] = {}  # by expert

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        multiplied = product_of(func, args, kwargs, self._places)
        if multiplied is None:
            result = func(*args, **kwargs)
            if getattr(func, "__name__", "") == "__getitem__" and _is_row_index(*args):
                self._gathered = Inputs(result, args[1])
            return result
        X, operands = multiplied.X, multiplied.operands
        if self._note is not None:
            if len(operands) == 1:
                self._note(operands[0], self._inputs(operands[0], X))
            for operand, rows in zip(operands, X, strict=True) if len(operands) > 1 else ():
                # A token that was not routed to an expert is a row of zeros.
                tokens = rows.any(-1).nonzero().squeeze(-1)
                self._note(operand, Inputs(rows[tokens], tokens))
        product = func(*args, **kwargs)
        if self._note_product is not None and len(operands) == 1:
            self._note_product(operands[0], self._inputs(operands[0], X), product)
        return product

    def _inputs(self, operand: Operand, X: torch.Tensor) -> Inputs:
        """The inputs of an operand. An expert's rows were picked from all tokens; its later layers keep their order."""
        if operand.expert is None:
            return Inputs(X)
        if self._gathered is not None and is_same_input(self._gathered.X, X):
            assert self._gathered.tokens is not None
            self._routed[operand.expert] = self._gathered.tokens
        tokens = self._routed.get(operand.expert)
        return Inputs(X, tokens if tokens is not None and len(tokens) == len(X) else None)


def _is_row_index(source: Any, index: Any = None, *_: Any) -> bool:
    """Tell whether rows of a matrix are picked by their numbers."""
    is_matrix = isinstance(source, torch.Tensor) and source.ndim == 2 and source.is_floating_point()
    return is_matrix and isinstance(index, torch.Tensor) and index.ndim == 1 and index.dtype == torch.int64
