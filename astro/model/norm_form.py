"""Which modules of a block are norms: they multiply normalized channels by a gain, and may add a bias.

Nothing is known here of classes or of names. A module whose parameters are vectors of one size is called once more with
the inputs that it had, and with other values of its parameters: what it returns must lie on a straight line.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from astro.model.differences import difference

__all__ = ["NormCall", "NormForm", "norm_calls", "norm_form"]

_FORM_TOLERANCE = 1e-4
"""Relative deviation up to which a module counts as a gain on normalized channels: some compute in float32. In 16 bits
it is two units of the last place."""
_THIRD = 3.0
"""Value of a parameter that shows whether 0 and 1 lie on a straight line."""


@dataclasses.dataclass(frozen=True)
class NormCall:
    """The call of a module that may be a norm.

    Attributes:
        module: The module.
        args: Positional arguments.
        kwargs: Keyword arguments.
        width: Size of the last dimension of what it returned.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    width: int


@dataclasses.dataclass(frozen=True)
class NormForm:
    """What a norm does with its parameters.

    Attributes:
        gains: Offset of the gain by the parameter's name in the block: it multiplies by offset + parameter.
        biases: Names of the parameters that are added.
    """

    gains: Mapping[str, float]
    biases: tuple[str, ...]


@contextlib.contextmanager
def norm_calls(block: nn.Module) -> Iterator[dict[str, NormCall]]:
    """Note the calls of modules that may be norms while the body of a `with` statement runs a block.

    Args:
        block: The block.

    Yields:
        Last call of each module by its name in the block, filled while the block runs.
    """
    calls: dict[str, NormCall] = {}

    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            width = next(module.parameters()).numel()
            if isinstance(output, torch.Tensor) and output.shape[-1] == width:
                calls[name] = NormCall(module, _copied(args), _copied(kwargs), width)

        return note

    hooks = [
        module.register_forward_hook(noting(name), with_kwargs=True)
        for name, module in block.named_modules()
        if _has_vectors_alone(module)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def norm_form(block: nn.Module, name: str, call: NormCall) -> NormForm | None:
    """Return what a module does with its parameters; None where it is no gain on normalized channels.

    With all parameters 0, a gain of 1 adds the normalized input n, and the gain's offset times n is there before.

    Args:
        block: The block, which is loaded. Its parameters are put back after every attempt.
        name: Name of the module in the block.
        call: Call of the module.
    """
    names = [f"{name}.{parameter}" for parameter, _ in call.module.named_parameters()]
    tolerance = max(_FORM_TOLERANCE, 2 * torch.finfo(next(call.module.parameters()).dtype).eps)
    gains: dict[str, float] = {}
    biases: list[str] = []

    def output(changed: str | None, value: float = 1.0) -> torch.Tensor:
        with _replaced(block, {n: value * (n == changed) for n in names}):
            result: torch.Tensor = call.module(*call.args, **call.kwargs)
            return result.double()

    zero = output(None)
    for parameter in names:
        change = output(parameter) - zero
        if difference(output(parameter, _THIRD) - zero, _THIRD * change) > tolerance:
            return None
        if bool((change - 1).abs().max() < tolerance):
            biases.append(parameter)
            continue
        energy = change.square().sum()
        offset = float((zero * change).sum() / energy) if energy > 0 else float("nan")
        if not torch.linalg.vector_norm(zero - offset * change) <= tolerance * energy.sqrt():
            return None
        gains[parameter] = float(round(offset)) if abs(offset - round(offset)) < tolerance else offset
    return NormForm(gains, tuple(biases)) if len(gains) == 1 else None


def _has_vectors_alone(module: nn.Module) -> bool:
    """Tell whether all parameters of a module, one or more, are vectors of one size and its own."""
    shapes = {tuple(parameter.shape) for parameter in module.parameters()}
    owned: Sequence[Any] = list(module.named_parameters(recurse=False))
    return len(shapes) == 1 and len(next(iter(shapes))) == 1 and len(owned) == len(list(module.parameters()))


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


@contextlib.contextmanager
def _replaced(block: nn.Module, values: Mapping[str, float]) -> Iterator[None]:
    """Fill some parameters with a number while the body of a `with` statement runs."""
    before = {name: block.get_parameter(name).data for name in values}
    try:
        for name, value in values.items():
            block.get_parameter(name).data = torch.full_like(before[name], value)
        yield
    finally:
        for name, data in before.items():
            block.get_parameter(name).data = data
