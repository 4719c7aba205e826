"""Forwards of a block in which the inputs of its quantized layers are rounded, as the server will round them.

Layers are recognized by where their weights lie, as in `activations`, so that experts in one parameter are rounded too:
each gets the tokens that are routed to it, and a token's scale depends on that token alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from astro.activation_config import ActivationScheme
from astro.errors import UnsupportedError
from astro.model.activation_rounding import InputGrid, round_activations
from astro.model.activations import BlockLayers
from astro.model.gradients import straight_through
from astro.model.operands import Operand, Places, is_same_input, product_of

__all__ = ["rounded_inputs"]


@contextmanager
def rounded_inputs(layers: BlockLayers, scheme: ActivationScheme | None, is_whole: bool = True) -> Iterator[None]:
    """Round what a block's quantized layers are multiplied with while the body of a `with` statement runs.

    Observations inside the body see the inputs as they are before they are rounded.

    Args:
        layers: The quantized layers of the block, which is loaded.
        scheme: The kind of grid of the inputs; None for none, which changes nothing.
        is_whole: Whether the body runs whole forwards, which reach every layer outside experts.

    Raises:
        UnsupportedError: A whole forward did not multiply with a layer in a way that is seen here, so that its inputs
            were not rounded.
    """
    if scheme is None:
        yield
        return
    rounding = _Rounding(layers.places(), scheme)
    with rounding:
        yield
    missed = [op.names[0] for op in layers.operands if op.expert is None and op not in rounding.rounded]
    if is_whole and missed:
        raise UnsupportedError(
            f"{', '.join(missed[:3])}: no product of this layer was seen in the block's forward, so that its inputs "
            "cannot be rounded as a server would; leave it in 16 bits (quantization.ignore), or inputs "
            "(activations.bits: 16)"
        )


class _Rounding(TorchFunctionMode):
    def __init__(self, places: Places, scheme: ActivationScheme) -> None:
        super().__init__()
        self._places, self._scheme = places, scheme
        self._last: tuple[torch.Tensor, InputGrid, torch.Tensor] | None = None
        self.rounded: set[Operand] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        product = product_of(func, args, kwargs, self._places)
        if product is None or not product.operands:
            return func(*args, **kwargs)
        self.rounded.update(product.operands)
        X = self._rounded(product.X, _common_grid(product.operands, self._scheme))
        if product.position < len(args):
            args = (*args[: product.position], X, *args[product.position + 1 :])
        else:
            kwargs[product.keyword] = X
        return func(*args, **kwargs)

    def _rounded(self, X: torch.Tensor, grid: InputGrid) -> torch.Tensor:
        """Round inputs; layers that round the same input alike one after the other share what comes of it."""
        if self._last is None or self._last[1] != grid or not is_same_input(self._last[0], X):
            self._last = (X, grid, straight_through(X, lambda X: round_activations(X, grid)))
        return self._last[2]


def _common_grid(operands: Sequence[Operand], scheme: ActivationScheme) -> InputGrid:
    """The grid of an operand, or of all experts that one product multiplies with; only dynamic grids are theirs."""
    grid = operands[0].grid(scheme)
    assert grid is not None
    assert all(operand.grid(scheme) == grid for operand in operands)
    return grid
