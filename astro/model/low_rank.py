"""A correction of low rank beside a linear layer, y = Ŵ x + B (A x), and blocks that compute with such corrections.

It is what PEFT calls a LoRA adapter with a scaling of 1. Shapes: R outputs, C inputs, rank r.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from astro.model.linear_layer import LinearLayer

__all__ = ["LowRank", "attach", "attached", "takes_correction"]


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A matrix B A of low rank that is added to a layer's weight.

    Attributes:
        A: Right factor, which reads the layer's inputs, any float dtype [r, C].
        B: Left factor, which makes outputs, of the same dtype [R, r].
    """

    A: torch.Tensor
    B: torch.Tensor

    @property
    def rank(self) -> int:
        """Number of products that are added."""
        return len(self.A)

    @property
    def num_weights(self) -> int:
        """Number of elements of both factors, which is also the number of multiplications for a token."""
        return self.A.numel() + self.B.numel()

    def to(self, *place: torch.device | torch.dtype) -> "LowRank":
        """Return the factors on a device, in a dtype, or both.

        Args:
            place: The device, the dtype.
        """
        A, B = self.A, self.B
        for where in place:
            A, B = A.to(where), B.to(where)
        return LowRank(A, B)

    def weight(self) -> torch.Tensor:
        """Return B A, float32 [R, C]."""
        return self.B.float() @ self.A.float()

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return B (A x), which a layer adds to its outputs.

        Args:
            x: Inputs of the layer [..., C], in the dtype of the factors.
        """
        return functional.linear(functional.linear(x, self.A), self.B)


def takes_correction(layer: LinearLayer) -> bool:
    """Tell whether a layer can have a correction of its own: it is a module, and no expert among others.

    Experts of a layer are one module in transformers, on which PEFT has no adapter for a single one.

    Args:
        layer: The layer.
    """
    return layer.expert is None


def attach(model: nn.Module, corrections: Mapping[str, LowRank], dtype: torch.dtype) -> list[RemovableHandle]:
    """Let linear layers add corrections to their outputs.

    A layer is called as it was before; the correction reads the inputs that the layer is called with.

    Args:
        model: The model that holds the layers.
        corrections: The correction of each layer by the name of its module, on the device of the layer.
        dtype: Dtype of the forward.

    Returns:
        A handle for each layer, which takes the correction away again.
    """
    return [
        model.get_submodule(name).register_forward_hook(_adding(correction.to(dtype)))
        for name, correction in corrections.items()
    ]


@contextlib.contextmanager
def attached(model: nn.Module, corrections: Mapping[str, LowRank], dtype: torch.dtype) -> Iterator[None]:
    """Let linear layers add corrections to their outputs while the body of a `with` statement runs.

    Args:
        model: The model that holds the layers.
        corrections: The correction of each layer by the name of its module, on the device of the layer.
        dtype: Dtype of the forward.
    """
    handles = attach(model, corrections, dtype)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(
    correction: LowRank,
) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
    def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + correction.outputs(inputs[0])

    return add
