"""What makes a layer hard to quantize: outlier channels of its inputs, heavy tails, single large weights.

An outlier channel is an input whose mean magnitude is more than six times that of the whole layer (Nrusimha et al.,
arXiv 2404.03605). Shapes: T tokens, C columns (inputs of a layer), R rows (outputs).
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from astro.activation_regularization import kurtosis_sum
from astro.calibration.channel_statistics import ChannelSums
from astro.model.activations import BlockLayers
from astro.model.operands import Inputs, Operand

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
        self._sums: dict[tuple[str, ...], _Sums] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """See what the block's layers read and make while the body of a `with` statement runs."""
        with self._layers.observed_products(self._note):
            yield

    def figures(self) -> tuple[list[LayerFigures], int]:
        """Return what was seen of each layer that a token reached, and the number of those that none was seen at."""
        seen = [operand for operand in self._layers.operands if operand.names in self._sums]
        return [self._figures(operand) for operand in seen], len(self._layers.operands) - len(seen)

    def _note(self, operand: Operand, inputs: Inputs, product: torch.Tensor) -> None:
        X = inputs.X
        if not X.numel():
            return
        if operand.names not in self._sums:
            self._sums[operand.names] = _Sums(operand.columns, X.device)
        self._sums[operand.names].add_(X, product)

    def _figures(self, operand: Operand) -> LayerFigures:
        sums = self._sums[operand.names]
        tokens = sums.channels.num_tokens
        channels = sums.channels.total / tokens
        input_kurtosis, output_kurtosis = (sums.kurtosis / tokens).tolist()
        mean = float(channels.mean())
        weights = [self._layers.weight(name).float() for name in operand.names]
        count = sum(W.numel() for W in weights)
        squares = sum(float(W.square().sum(dtype=torch.float64)) for W in weights)
        largest = max(float(W.abs().max()) for W in weights)
        return LayerFigures(
            names=operand.names,
            block=self._index,
            tokens=tokens,
            outlier_channels=tuple((channels > OUTLIER_RATIO * mean).nonzero().flatten().tolist()),
            input_ratio=float(channels.max()) / mean if mean else 0.0,
            input_max=float(sums.channels.maximum.max()),
            input_kurtosis=input_kurtosis,
            output_kurtosis=output_kurtosis,
            weight_max=largest,
            weight_ratio=largest / (squares / count) ** 0.5 if squares else 0.0,
        )


class _Sums:
    """Sums over the tokens that reached a layer, on the device that computes.

    Attributes:
        channels: Sums of each channel.
        kurtosis: Sums of the kurtosis of inputs and of outputs, float64 [2].
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.channels = ChannelSums(columns, device)
        self.kurtosis = torch.zeros(2, dtype=torch.float64, device=device)

    def add_(self, X: torch.Tensor, Y: torch.Tensor) -> None:
        """Take the inputs [..., C] and outputs [..., R] of some more tokens, at least one."""
        self.channels.add_(X)
        self.kurtosis += torch.stack([kurtosis_sum(X), kurtosis_sum(Y)])
