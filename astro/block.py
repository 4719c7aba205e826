"""One transformer block: its forward, the statistics of its linear layers, their quantization.

Shapes: B sequences, T tokens, H hidden size.
"""

import contextlib
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from astro.config import Quantization, Regularizer
from astro.errors import NumericalError, UnsupportedError
from astro.hessian import HessianAccumulator
from astro.layer import QuantizedLinear, quantize_group
from astro.recording import BlockCall
from astro.report import LayerRecord

__all__ = ["BlockStatistics", "by_settings", "forward", "input_groups", "input_of", "quantize_block"]


def forward(block: nn.Module, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
    """The block's output hidden states [B, T, H] for input hidden states [B, T, H]."""
    output = block(hidden, *call.args, **call.kwargs)
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


class BlockStatistics:
    """Collects the Hessians of a block's linear layers while its forward runs.

    Layers that are called one after the other with the very same input share one Hessian: q, k and v; gate and up.
    Which do is found in the first forward and checked in every later one.

    Attributes:
        groups: names of the layers that share an input, in the order of the first forward.
        seconds: time spent on the products.
    """

    def __init__(self, linears: dict[str, nn.Linear], device: torch.device) -> None:
        self._linears = linears
        self._device = device
        self._accumulators: list[HessianAccumulator] = []
        self._group_of: dict[str, int] = {}
        self._last: tuple[torch.Tensor, int] | None = None
        self.groups: list[list[str]] = []
        self.seconds = 0.0

    def run(self, action: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a forward of the block under observation and return its result."""
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in self._linears.items()]
        try:
            return action()
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def finish_(self) -> Iterator[tuple[list[str], torch.Tensor, int]]:
        """Groups with their Hessian and token count, each handed out once and then forgotten.

        Raises:
            NumericalError: a layer was never reached, or saw values that are not finite.
        """
        _require_reached(self._linears, self._group_of)
        accumulators, self._accumulators = self._accumulators, []
        for names, accumulator in zip(self.groups, accumulators, strict=True):
            yield names, accumulator.finish_("+".join(names)), accumulator.num_tokens

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def observe(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._observe(name, args[0])

        return observe

    def _observe(self, name: str, X: torch.Tensor) -> None:
        last, group = self._last if self._last is not None else (None, -1)
        shares = last is not None and _is_same(last, X)
        if name not in self._group_of:
            self._open(name, X, group if shares else None)
        own = self._group_of[name]
        if name == self.groups[own][0]:
            start = time.perf_counter()
            self._accumulators[own].add_(X)
            self.seconds += time.perf_counter() - start
        elif not shares or group != own:
            raise UnsupportedError(f"{name} shared its input with {self.groups[own][0]} in one forward, not in another")
        self._last = (X, own)

    def _open(self, name: str, X: torch.Tensor, group: int | None) -> None:
        if group is None:
            group = len(self.groups)
            self.groups.append([])
            self._accumulators.append(HessianAccumulator(X.shape[-1], self._device))
        self.groups[group].append(name)
        self._group_of[name] = group


class _Reached(Exception):
    """Ends a forward that is only wanted up to one layer."""


def input_groups(linears: Mapping[str, nn.Linear], action: Callable[[], torch.Tensor]) -> list[list[str]]:
    """Names of the layers that share an input, in the order in which a forward calls them.

    Args:
        linears: layers of a block by name.
        action: a forward of the block.

    Raises:
        NumericalError: the forward does not reach a layer.
    """
    groups: list[list[str]] = []
    last: list[torch.Tensor] = []  # kept, so that no other input can take its place in memory

    def note(name: str, X: torch.Tensor) -> None:
        if last and _is_same(last[0], X):
            groups[-1].append(name)
        else:
            groups.append([name])
        last[:] = [X]

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, module in linears.items()
    ]
    try:
        action()
    finally:
        for handle in handles:
            handle.remove()
    _require_reached(linears, {name for names in groups for name in names})
    return groups


def input_of(name: str, linear: nn.Linear, action: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The input [..., C] that a layer gets in a forward, which goes no further.

    Args:
        name: of the layer, for messages.
        linear: the layer.
        action: a forward of its block.

    Raises:
        NumericalError: the forward does not reach the layer.
    """
    seen: list[torch.Tensor] = []

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    handle = linear.register_forward_pre_hook(note)
    try:
        with contextlib.suppress(_Reached):
            action()
    finally:
        handle.remove()
    if not seen:
        raise NumericalError(f"{name}: reached by some calibration chunks, not by all; use longer sequences")
    return seen[0]


def _is_same(X: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two inputs, both still alive, are one."""
    return X.data_ptr() == other.data_ptr() and X.shape == other.shape


def _require_reached(linears: Iterable[str], reached: Container[str]) -> None:
    unreached = [name for name in linears if name not in reached]
    if unreached:
        raise NumericalError(f"{unreached[0]}: no calibration token reached this layer; use more calibration text")


def quantize_block(
    weights: Mapping[str, torch.Tensor],
    statistics: Iterable[tuple[list[str], torch.Tensor, int]],
    quantization: Mapping[str, Quantization],
    regularization: Regularizer,
    scale_dtype: torch.dtype,
    widths: Sequence[int] = (),
) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
    """Quantize every linear layer of a block.

    Args:
        weights: original weight [R, C] of each layer by name, on the device of the statistics.
        statistics: groups with Hessian and token count.
        quantization: grid and solver of each layer by name.
        regularization: what is done to the weights before.
        scale_dtype: dtype in which scales are stored.
        widths: that are measured besides.

    Returns:
        Each layer on its grid by name, and one record a group.
    """
    quantized: dict[str, QuantizedLinear] = {}
    records = []
    for names, H, num_tokens in statistics:
        for settings, members in by_settings(names, quantization):
            group = [(name, weights[name]) for name in members]
            solved, record = quantize_group(group, H, num_tokens, settings, regularization, scale_dtype, widths)
            quantized.update(solved)
            records.append(record)
    return quantized, records


def by_settings(names: Sequence[str], quantization: Mapping[str, Quantization]) -> list[tuple[Quantization, list[str]]]:
    """Layers that share an input, apart where an override gives them different grids."""
    groups: list[tuple[Quantization, list[str]]] = []
    for name in names:
        found = next((members for settings, members in groups if settings == quantization[name]), None)
        if found is None:
            groups.append((quantization[name], [name]))
        else:
            found.append(name)
    return groups
