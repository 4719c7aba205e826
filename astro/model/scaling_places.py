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
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from astro.model.block_call import BlockState
from astro.model.block_products import BlockProducts, Product
from astro.model.differences import TOLERANCE_EPS, is_same, largest_difference, multiplied_channels
from astro.model.norm_form import NormCall, norm_calls, norm_form

__all__ = ["WIDE_BYTES", "Place", "Reader", "Trial"]

WIDE_BYTES = 16 << 30
"""Size of a block's parameters in float64 up to which it is tried in float64; a larger one in its compute dtype."""

_EXPONENTS = 3
"""Factors that are tried are 2⁻³ to 2³, and their negatives."""
_MARK = -2
"""Factor of the rows whose binary digit is 1."""
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


class Trial:
    """Tries what can be done to the channels of a loaded block, on a few tokens."""

    def __init__(self, block: nn.Module, action: Callable[[], BlockState]) -> None:
        """Run the block as it is.

        Args:
            block: The block, which is loaded. Its parameters are put back after every attempt.
            action: A forward of the block on a few tokens, the same every time.
        """
        self._block, self._action = block, action
        self._products: list[Product] = []
        with norm_calls(block) as self._norms, BlockProducts(block, self._note):
            self._output = action()

    def norms(self) -> list[Place]:
        """Return every norm of the block into which factors can go, with all that reads it."""
        places = []
        for name, call in self._norms.items():
            form = norm_form(self._block, name, call)
            readers = self._readers_of_module(call) if form else ()
            if form and readers:
                rows = torch.arange(call.width)
                places.append(Place(name, rows, call.width, form.gains, None, form.biases, readers))
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

    def _readers_of_module(self, call: NormCall) -> tuple[Reader, ...]:
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
            if is_same(product.X, before.X):
                return before.X
            is_scaled = len(factors) == before.X.shape[-1] and is_same(
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
        tolerance = TOLERANCE_EPS * torch.finfo(output.hidden.dtype).eps
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
            marked = multiplied_channels(X, consumer.X, _MARK)
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


def _multiplying(parameter: str, factors: torch.Tensor) -> Callable[[Product, torch.Tensor], torch.Tensor]:
    def change(product: Product, Y: torch.Tensor) -> torch.Tensor:
        return Y * factors.to(Y.device, Y.dtype) if product.parameter == parameter else Y

    return change


@contextlib.contextmanager
def _hooked(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    hook = module.register_forward_hook(lambda module, args, output: change(output))
    try:
        yield
    finally:
        hook.remove()
