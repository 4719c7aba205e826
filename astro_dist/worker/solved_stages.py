"""The layers of a block's earlier stages as they were quantized, with which the block computes in a later stage."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from astro.model.low_rank import LowRank, attached
from astro.quantization.grid import QuantizedLinear
from astro_dist.planning.units import BlockUnit
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.split_block import BlockInParts

__all__ = ["SolvedLayers", "put_in", "solved_before"]


@dataclasses.dataclass(frozen=True)
class SolvedLayers:
    """Layers as they were quantized.

    Attributes:
        weights: Weights by the layer's name, in the compute dtype.
        corrections: Corrections of low rank by the layer's name, of the layers that have one.
    """

    weights: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    corrections: Mapping[str, LowRank] = dataclasses.field(default_factory=dict)

    def with_layers(self, solved: Iterable[tuple[str, QuantizedLinear]], dtype: torch.dtype) -> "SolvedLayers":
        """Return these layers and others.

        Args:
            solved: Name of each of the others, and the layer, on the device; they are taken one at a time.
            dtype: The compute dtype.
        """
        weights, corrections = dict(self.weights), dict(self.corrections)
        for name, layer in solved:
            weights[name] = layer.dequantize(dtype)
            if layer.correction:
                corrections[name] = layer.correction
        return SolvedLayers(weights, corrections)


def solved_before(runner: BlockRunner, block: BlockInParts, stage: int) -> SolvedLayers:
    """Return the layers of the stages before one, on the device.

    Args:
        runner: Runner of the worker's blocks.
        block: The block, laid out.
        stage: Index of the stage.

    Raises:
        DamagedError: A part of a solve is missing, or not as it was written.
    """
    batches = (batch for earlier in block.stages[:stage] for batch in earlier)
    layers = ((name, layer.to(runner.device)) for batch in batches for name, layer in block.solved(batch)[0].items())
    return SolvedLayers().with_layers(layers, runner.spec.compute_dtype)


@contextmanager
def put_in(runner: BlockRunner, unit: BlockUnit, solved: SolvedLayers) -> Iterator[None]:
    """Let a loaded block compute with layers as they were solved while the body of a `with` statement runs.

    Args:
        runner: Runner of the worker's blocks.
        unit: Unit of the block.
        solved: The layers.
    """
    layers, model = runner.layers(unit), runner.skeleton.model
    with layers.replaced(solved.weights), attached(model, solved.corrections, runner.spec.compute_dtype):
        yield
