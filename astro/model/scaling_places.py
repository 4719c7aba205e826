"""Where the factors of a smoothed input can go: the norm, or the linear layer, whose channels that input is.

Nothing is known here of architectures or of names. Each candidate is tried in the block's own forward: what it returns
is multiplied by powers of two, one for each channel. Where every weight that reads it sees its own input times just
these factors, and the block returns what it did when these inputs are put back, then the factors may be moved. A router
or a gate that reads the input is found like any other reader. Whatever else happens to the channels (a residual, a
nonlinearity, a head's norm) leaves something different, and the candidate is given up.

Which row of a linear layer makes which channel is read off in as many forwards as the number of rows has binary digits:
rows whose digit is 1 are multiplied by −2. So heads of queries that share one of keys and values are found, whatever
the order. Products with powers of two are exact, so all of this holds in any dtype. Half of the factors are negative,
so that nothing passes that tells signs apart, such as ReLU. Shapes: T tokens, C channels, R rows.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from astro.model.block_call import BlockState
from astro.model.block_products import BlockProducts, Product

__all__ = ["WIDE_BYTES", "Place", "Reader", "Trial", "largest_difference"]

WIDE_BYTES = 16 << 30
"""Size of a block's parameters in float64 up to which it is tried in float64; a larger one in its compute dtype."""

_EXPONENTS = 3
"""Factors that are tried are 2⁻³ to 2³, and their negatives."""
_MARK = -2
"""Factor of the rows whose binary digit is 1."""
_TOLERANCE_EPS = 64
"""Units of the last place by which something may differ that was only multiplied by powers of two."""
_FORM_TOLERANCE = 1e-4
"""Relative deviation up to which a module counts as a gain on normalized channels: some compute in float32. In 16 bits
it is two units of the last place."""
_THIRD = 3.0
"""Value of a parameter that shows whether 0 and 1 lie on a straight line."""
_MOST_CANDIDATES = 4
"""Weights before a reader that are tried, the nearest first."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """A weight that is multiplied with an input.

    Attributes:
        parameter: Name of the parameter in the block.
        axis: Axis of the parameter along which the channels lie.
    """

    parameter: str
    axis: int


@dataclasses.dataclass(frozen=True)
class Place:
    """Something that makes an input, and can make its channels smaller for nothing.

    Attributes:
        name: Name of the module in the block.
        rows: What makes each channel: int64 [C], below `num_rows`. For a norm it is the channel itself.
        num_rows: Number of rows of the linear layer, or channels of the norm.
        gains: Offset of each gain of a norm by parameter: it multiplies by offset + parameter, and the offset is mostly
            0, in Gemma 1.
        weight: Weight whose rows make the channels, and the axis of its rows; None for a norm.
        biases: Names of the parameters that are added to the rows.
        readers: Every weight that reads the channels.
    """

    name: str
    rows: torch.Tensor
    num_rows: int
    gains: Mapping[str, float]
    weight: Reader | None
    biases: tuple[str, ...]
    readers: tuple[Reader, ...]


class _NotExact(Exception):
    """Ends a forward in which something happens to channels that cannot be made up for."""


class _Seen(Exception):
    """Ends a forward that is only wanted up to some product."""


@dataclasses.dataclass(frozen=True)
class _NormCall:
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


class Trial:
    """Tries what can be done to the channels of a loaded block, on a few tokens."""

    def __init__(self, block: nn.Module, action: Callable[[], BlockState]) -> None:
        """Run the block as it is.

        Args:
            block: The block, which is loaded. Its parameters are put back after every attempt.
            action: A forward of the block on a few tokens, the same every time.
        """
        self._block, self._action = block, action
        self._modules = {name: module for name, module in block.named_modules() if _has_vectors_alone(module)}
        self._norms: dict[str, _NormCall] = {}
        self._products: list[Product] = []
        hooks = [
            module.register_forward_hook(self._noting(name), with_kwargs=True) for name, module in self._modules.items()
        ]
        try:
            with BlockProducts(block, self._note):
                self._output = action()
        finally:
            for hook in hooks:
                hook.remove()

    def norms(self) -> list[Place]:
        """Return every norm of the block into which factors can go, with all that reads it."""
        places = []
        for name, call in self._norms.items():
            form = self._form(name, call)
            readers = self._readers_of_module(call) if form else ()
            if form and readers:
                places.append(Place(name, torch.arange(call.width), call.width, form[0], None, form[1], readers))
        return places

    def linear(self, parameter: str) -> Place | None:
        """Return the linear layer whose rows are the channels that a weight reads; None where there is none.

        Args:
            parameter: Name of the parameter that holds the reading weight. Where it holds those of all experts, what is
                found holds for every expert.
        """
        at = next((i for i, product in enumerate(self._products) if product.parameter == parameter), None)
        if at is None:
            return None
        experts = (None, self._products[at].expert)
        others = (p for p in reversed(self._products[:at]) if p.expert in experts and p.parameter != parameter)
        nearest: dict[str, Product] = {}
        for product in others:
            nearest.setdefault(product.parameter, product)
        for producer in list(nearest.values())[:_MOST_CANDIDATES]:
            for span in self._spans(producer, self._products[at].X.shape[-1]):
                place = self._tried(producer, span, self._products[at])
                if place is not None:
                    return place
        return None

    def _note(self, product: Product) -> torch.Tensor:
        self._products.append(dataclasses.replace(product, X=product.X.clone()))
        return product.X

    def _noting(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            width = next(module.parameters()).numel()
            if isinstance(output, torch.Tensor) and output.shape[-1] == width:
                self._norms[name] = _NormCall(module, _copied(args), _copied(kwargs), width)

        return note

    def _form(self, name: str, call: _NormCall) -> tuple[dict[str, float], tuple[str, ...]] | None:
        """The offsets of a module's gains and the names of its biases; None where it is no gain on its channels.

        With all parameters 0, a gain of 1 adds the normalized input n, and the gain's offset times n is there before.
        """
        names = [f"{name}.{parameter}" for parameter, _ in call.module.named_parameters()]
        tolerance = max(_FORM_TOLERANCE, 2 * torch.finfo(next(call.module.parameters()).dtype).eps)
        gains: dict[str, float] = {}
        biases: list[str] = []

        def output(one: str | None, value: float = 1.0) -> torch.Tensor:
            with _replaced(self._block, {n: value * (n == one) for n in names}):
                result: torch.Tensor = call.module(*call.args, **call.kwargs)
                return result.double()

        zero = output(None)
        for parameter in names:
            change = output(parameter) - zero
            if _difference(output(parameter, _THIRD) - zero, _THIRD * change) > tolerance:
                return None
            if bool((change - 1).abs().max() < tolerance):
                biases.append(parameter)
                continue
            energy = change.square().sum()
            offset = float((zero * change).sum() / energy) if energy > 0 else float("nan")
            if not torch.linalg.vector_norm(zero - offset * change) <= tolerance * energy.sqrt():
                return None
            gains[parameter] = float(round(offset)) if abs(offset - round(offset)) < tolerance else offset
        return (gains, tuple(biases)) if len(gains) == 1 else None

    def _readers_of_module(self, call: _NormCall) -> tuple[Reader, ...]:
        factors = self._factors(call.width)
        with _hooked(call.module, lambda output: output * factors.to(output.device, output.dtype)):
            return self._readers(factors)

    def _readers(
        self, factors: torch.Tensor, change: Callable[[Product, torch.Tensor], torch.Tensor] = lambda product, Y: Y
    ) -> tuple[Reader, ...]:
        """Every weight that reads channels that are multiplied by factors [C]; none where that is not all they do."""
        readers: dict[Reader, None] = {}
        remaining = iter(self._products)

        def compare(product: Product) -> torch.Tensor:
            before = next(remaining, None)
            if before is None or before.place != product.place or before.X.shape != product.X.shape:
                raise _NotExact
            if _is_same(product.X, before.X):
                return before.X
            is_scaled = len(factors) == before.X.shape[-1] and _is_same(
                product.X, before.X * factors.to(before.X.device, before.X.dtype)
            )
            if not is_scaled:
                raise _NotExact
            readers[Reader(product.parameter, product.axis)] = None
            return before.X

        try:
            with BlockProducts(self._block, compare, change):
                output = self._action()
        except _NotExact:
            return ()
        tolerance = _TOLERANCE_EPS * torch.finfo(output.hidden.dtype).eps
        return tuple(readers) if largest_difference(output, self._output) <= tolerance else ()

    def _spans(self, producer: Product, num_channels: int) -> Iterator[slice]:
        """The rows of a weight that may make channels: all of them, or a part of layers that lie in one weight."""
        rows = self._num_rows(producer)
        shared = (rows - num_channels) // 2
        starts = [(0, rows), (rows - num_channels, rows), (0, num_channels), (rows - shared, rows)]
        yield from (slice(*span) for span in dict.fromkeys(starts) if 0 <= span[0] < span[1] <= rows)

    def _num_rows(self, producer: Product) -> int:
        return self._block.get_parameter(producer.parameter).shape[self._row_axis(producer)]

    def _row_axis(self, producer: Product) -> int:
        """The axis of a parameter's rows: of its last two axes the one that is not the columns'."""
        return 2 * self._block.get_parameter(producer.parameter).ndim - 3 - producer.axis

    def _tried(self, producer: Product, span: slice, consumer: Product) -> Place | None:
        """The place that some rows of a weight are for the channels of a reader; None where they are none."""
        rows = self._rows_by_channel(producer, span, consumer)
        if rows is None:
            return None
        num_rows = self._num_rows(producer)
        of_rows = torch.ones(num_rows, dtype=torch.float64)
        of_rows[rows] = self._factors(num_rows)[rows]
        readers = self._readers(of_rows[rows], _multiplying(producer.parameter, of_rows))
        if Reader(consumer.parameter, consumer.axis) not in readers:
            return None
        biases = (producer.bias,) if producer.bias else ()
        name, weight = producer.parameter.removesuffix(".weight"), Reader(producer.parameter, self._row_axis(producer))
        return Place(name, rows, num_rows, {}, weight, biases, readers)

    def _rows_by_channel(self, producer: Product, span: slice, consumer: Product) -> torch.Tensor | None:
        """The row of a weight that makes each channel of a reader, int64 [C]; None where a channel has none."""
        num_rows = self._num_rows(producer)
        # Numbers begin at 1, so that a channel that nothing happens to is told from that of the first row.
        numbers = torch.zeros(num_rows, dtype=torch.int64)
        numbers[span] = torch.arange(1, span.stop - span.start + 1)
        found = torch.zeros(consumer.X.shape[-1], dtype=torch.int64)
        for digit in range(int(numbers.max()).bit_length()):
            digits = (numbers >> digit) & 1
            X = self._input_of(consumer, _multiplying(producer.parameter, torch.where(digits > 0, _MARK, 1).double()))
            marked = _marked(X, consumer.X)
            if marked is None:
                return None
            found += marked.long().cpu() << digit
        return found - 1 + span.start if bool(((found > 0) & (found <= numbers.max())).all()) else None

    def _input_of(self, consumer: Product, change: Callable[[Product, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What a weight is multiplied with first, if products before it are changed."""
        seen: list[torch.Tensor] = []

        def note(product: Product) -> torch.Tensor:
            if product.place == consumer.place:
                seen.append(product.X)
                raise _Seen
            return product.X

        with contextlib.suppress(_Seen), BlockProducts(self._block, note, change):
            self._action()
        return seen[0] if seen else torch.full_like(consumer.X, torch.nan)

    def _factors(self, count: int) -> torch.Tensor:
        """Powers of two that differ from channel to channel, float64 [count]; the same every time."""
        generator = torch.Generator().manual_seed(count)
        exponents = torch.randint(-_EXPONENTS, _EXPONENTS + 1, (count,), generator=generator)
        return torch.exp2(exponents.double()) * (1 - 2 * torch.randint(0, 2, (count,), generator=generator))


def largest_difference(state: BlockState, other: BlockState) -> float:
    """Return how far two states lie apart in anything that passes to the next block, relative to the largest value.

    Args:
        state: A state.
        other: Another state.

    Returns:
        The largest difference; infinity where they do not hold the same kinds of things.
    """
    if state.others.keys() != other.others.keys():
        return math.inf
    pairs = [(state.hidden, other.hidden), *((value, other.others[name]) for name, value in state.others.items())]
    return max(_difference(*pair) for pair in pairs)


def _difference(A: torch.Tensor, B: torch.Tensor) -> float:
    if A.shape != B.shape:
        return math.inf
    if not A.is_floating_point():
        return 0.0 if torch.equal(A, B) else math.inf
    if not A.numel() or torch.equal(A, B):
        return 0.0
    difference = float((A - B).abs().max() / B.abs().max())
    return difference if math.isfinite(difference) else math.inf


def _is_same(A: torch.Tensor, B: torch.Tensor) -> bool:
    return _difference(A, B) <= _TOLERANCE_EPS * torch.finfo(A.dtype).eps


def _marked(X: torch.Tensor, before: torch.Tensor) -> torch.Tensor | None:
    """Say of each channel whether it is −2 times what it was, bool [C]; None where one is neither that nor the same."""
    X, before = X.reshape(-1, X.shape[-1]), before.reshape(-1, before.shape[-1])
    if X.shape != before.shape:
        return None
    allowed = _TOLERANCE_EPS * torch.finfo(X.dtype).eps * before.abs().amax(0)
    is_same, is_marked = ((X - factor * before).abs().amax(0) <= allowed for factor in (1, _MARK))
    return is_marked if bool((is_same ^ is_marked).all()) else None


def _multiplying(parameter: str, factors: torch.Tensor) -> Callable[[Product, torch.Tensor], torch.Tensor]:
    def change(product: Product, Y: torch.Tensor) -> torch.Tensor:
        return Y * factors.to(Y.device, Y.dtype) if product.parameter == parameter else Y

    return change


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


@contextlib.contextmanager
def _hooked(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    hook = module.register_forward_hook(lambda module, args, output: change(output))
    try:
        yield
    finally:
        hook.remove()
