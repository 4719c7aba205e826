"""A block's weights as what its activations are multiplied with, and products that are recognized by them.

Shapes: T tokens, C columns, E experts.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from astro.activation_config import ActivationScheme
from astro.model.activation_rounding import InputGrid
from astro.model.clipped_rounding import InputClips
from astro.model.torch_products import PRODUCTS

__all__ = ["Inputs", "Operand", "Places", "Product", "is_same_input", "names_of", "product_of", "share_input"]


@dataclasses.dataclass(frozen=True)
class Operand:
    """A weight that a block multiplies its activations with: that of a linear layer, or gate and up of one expert.

    Attributes:
        names: Names of the layers in the weight, which read the same input.
        parameter: Name of the model's parameter that holds the weight.
        expert: Index of the expert; None outside experts.
        columns: Input size.
        clips: Learned grid of its inputs; None where it has none.
    """

    names: tuple[str, ...]
    parameter: str
    expert: int | None
    columns: int
    clips: InputClips | None = None

    def grid(self, scheme: ActivationScheme | None) -> InputGrid | None:
        """Return the grid to which servers round the inputs; None where they stay as they are.

        Args:
            scheme: Kind of the grid; None for none.
        """
        if scheme is None or not scheme.is_static:
            return scheme
        assert self.clips is not None, f"{self.names[0]} has no clips"
        return self.clips


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What an operand is multiplied with.

    Attributes:
        X: Inputs [..., C].
        tokens: Which tokens of the forward the inputs of an expert belong to, int64 [T]; None outside experts, whose
            inputs are all tokens in their order, and where it could not be seen.
    """

    X: torch.Tensor
    tokens: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product that a forward is about to compute.

    Attributes:
        X: Its left side, the inputs [..., C].
        operands: The operands of the block that its right side holds: none, one, or those of all experts.
        position: Place of X among the positional arguments of the call.
        keyword: Name of X among its keyword arguments, where it is no positional argument.
    """

    X: torch.Tensor
    operands: Sequence[Operand]
    position: int
    keyword: str


Places = Mapping[tuple[int, int], Sequence[Operand]]
"""The operands by the place in memory and the number of dimensions of the weight that they are multiplied with."""


def product_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], places: Places) -> Product | None:
    """Return the matrix product that a call of torch computes; None for any other call.

    Args:
        func: Function of torch that is called.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        places: Where the weights of a block's operands lie.
    """
    arguments = PRODUCTS.get(getattr(func, "__name__", ""))
    if arguments is None:
        return None
    X, weight = (args[i] if i < len(args) else kwargs[name] for i, name in arguments[:2])
    return Product(X, places.get((weight.data_ptr(), weight.ndim), ()), *arguments[0])


def is_same_input(X: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two inputs, which are both alive, are the same memory.

    Args:
        X: Inputs of a layer.
        other: Inputs of another layer.
    """
    return X.data_ptr() == other.data_ptr() and X.shape == other.shape


def share_input(operand: Operand, X: torch.Tensor, other: Operand, other_X: torch.Tensor) -> bool:
    """Tell whether two operands outside experts are one input group.

    They are where they read the same memory and round it alike: a layer with learned clips of its own multiplies with
    other inputs than its neighbour.

    Args:
        operand: An operand.
        X: Its inputs.
        other: Another operand.
        other_X: Its inputs, which are alive too.
    """
    return is_same_input(X, other_X) and operand.clips == other.clips


def names_of(operands: Iterable[Operand]) -> list[str]:
    """Return the names of all layers of some operands.

    Args:
        operands: The operands, e.g. of an input group.
    """
    return [name for operand in operands for name in operand.names]
