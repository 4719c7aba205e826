"""What makes a layer hard to quantize: outlier channels of its inputs, heavy tails, single large weights.

An outlier channel is an input whose mean magnitude is more than six times that of the whole layer (Nrusimha et al.,
arXiv 2404.03605). Shapes: T tokens, C columns (inputs of a layer), R rows (outputs).
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from astro.activation_regularization import kurtosis_sum
from astro.model.activations import BlockLayers, Inputs, Operand

__all__ = ["OUTLIER_RATIO", "BlockWatch", "LayerFigures"]

OUTLIER_RATIO = 6.0
"""How many times the mean magnitude of a layer's inputs a channel's must exceed to be an outlier channel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """What was seen of a layer, or of layers that are joined in one weight.

    Attributes:
        names: Names of the layers.
        block: Index of the block.
        tokens: Number of tokens that reached the layer.
        outlier_channels: Numbers of the outlier channels of its input.
        input_ratio: Largest mean magnitude of a channel, as a multiple of the mean magnitude of all.
        input_max: Largest magnitude of an input.
        input_kurtosis: Kurtosis of an input over its channels, the mean over tokens; 3 for a normal distribution.
        output_kurtosis: The same of the outputs.
        weight_max: Largest magnitude of a weight.
        weight_ratio: The same as a multiple of the root mean square of the layer's weights.
    """

    names: tuple[str, ...]
    block: int
    tokens: int
    outlier_channels: tuple[int, ...]
    input_ratio: float
    input_max: float
    input_kurtosis: float
    output_kurtosis: float
    weight_max: float
    weight_ratio: float


class BlockWatch:
    """Watches the layers of one block while tokens pass through it."""

    def __init__(self, index: int, layers: BlockLayers) -> None:
        """Look at the weights of a block.

        Args:
            index: Index of the block.
            layers: Its layers, whose weights are loaded.
        """
        self._index, self._layers = index, layers
        self._sums = {operand.names: _Sums(operand.columns) for operand in layers.operands}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """See what the block's layers read and make while the body of a `with` statement runs."""
        with self._layers.observed_products(self._note):
            yield

    def figures(self) -> tuple[list[LayerFigures], int]:
        """Return what was seen of each layer that a token reached, and the number of those that none was seen at."""
        seen = [operand for operand in self._layers.operands if self._sums[operand.names].tokens]
        return [self._figures(operand) for operand in seen], len(self._layers.operands) - len(seen)

    def _note(self, operand: Operand, inputs: Inputs, product: torch.Tensor) -> None:
        self._sums[operand.names].add_(inputs.X, product)

    def _figures(self, operand: Operand) -> LayerFigures:
        sums = self._sums[operand.names]
        channels = sums.magnitudes / sums.tokens
        mean = float(channels.mean())
        weights = [self._layers.weight(name).float() for name in operand.names]
        count = sum(W.numel() for W in weights)
        squares = sum(float(W.square().sum(dtype=torch.float64)) for W in weights)
        largest = max(float(W.abs().max()) for W in weights)
        return LayerFigures(
            names=operand.names,
            block=self._index,
            tokens=sums.tokens,
            outlier_channels=tuple((channels > OUTLIER_RATIO * mean).nonzero().flatten().tolist()),
            input_ratio=float(channels.max()) / mean if mean else 0.0,
            input_max=sums.largest,
            input_kurtosis=sums.input_kurtosis / sums.tokens,
            output_kurtosis=sums.output_kurtosis / sums.tokens,
            weight_max=largest,
            weight_ratio=largest / (squares / count) ** 0.5 if squares else 0.0,
        )


class _Sums:
    """Sums over the tokens that reached a layer.

    Attributes:
        tokens: Number of tokens.
        magnitudes: Sum of the magnitudes of each channel, float64 [C] on the CPU.
        largest: Largest magnitude.
        input_kurtosis: Sum of the kurtosis of inputs.
        output_kurtosis: Sum of the kurtosis of outputs.
    """

    def __init__(self, columns: int) -> None:
        self.tokens, self.largest = 0, 0.0
        self.magnitudes = torch.zeros(columns, dtype=torch.float64)
        self.input_kurtosis = self.output_kurtosis = 0.0

    def add_(self, X: torch.Tensor, Y: torch.Tensor) -> None:
        """Take the inputs [..., C] and outputs [..., R] of some more tokens."""
        X, Y = X.reshape(-1, X.shape[-1]), Y.reshape(-1, Y.shape[-1])
        if not len(X):
            return
        size = X.float().abs()
        self.tokens += len(X)
        self.magnitudes += size.sum(0, dtype=torch.float64).cpu()
        self.largest = max(self.largest, float(size.max()))
        self.input_kurtosis += float(kurtosis_sum(X))
        self.output_kurtosis += float(kurtosis_sum(Y))
