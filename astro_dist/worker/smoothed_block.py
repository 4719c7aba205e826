"""What a run decided about the inputs of a block's layers, and the block's tensors as that wants them."""

from collections.abc import Mapping, Sequence

import torch

from astro.model.linear_layer import LinearLayer
from astro.model.skeleton import Skeleton
from astro.model.smoothed_tensors import SmoothedInput, smoothed_tensors
from astro_dist.planning.units import BlockUnit
from astro_dist.run_directory.unit_record import SmoothingResult
from astro_dist.schedule.names import smoothing_unit
from astro_dist.worker.spec import WorkerSpec

__all__ = ["SmoothedBlocks"]


class SmoothedBlocks:
    """Turns tensors of the source into those of the same model with smoothed inputs.

    Every worker does so whenever it reads a block of the source. So all that follows, from Hessians to shards, is about
    smoothed inputs and needs not know of it.
    """

    def __init__(self, spec: WorkerSpec, skeleton: Skeleton) -> None:
        """Begin without a block.

        Args:
            spec: What the worker was built from.
            skeleton: The model.
        """
        self._spec, self._skeleton = spec, skeleton
        self._inputs: tuple[int, tuple[SmoothedInput, ...]] | None = None
        self._layers: tuple[int, list[LinearLayer]] | None = None

    def inputs(self, unit: BlockUnit) -> Sequence[SmoothedInput]:
        """Return how the inputs of a block's layers are smoothed; empty where nothing is smoothed.

        Args:
            unit: Unit of the block.

        Raises:
            DamagedError: The record that says so is missing, or not as it was written.
        """
        if self._spec.activations.smoothing == "none":
            return ()
        if self._inputs is None or self._inputs[0] != unit.index:
            decided = self._spec.run.read(smoothing_unit(unit.index), SmoothingResult)
            self._inputs = (unit.index, decided.smoothed_inputs)
        return self._inputs[1]

    def layers(self, unit: BlockUnit) -> list[LinearLayer]:
        """Return all linear layers of a block, quantized or not.

        Args:
            unit: Unit of the block.
        """
        if self._layers is None or self._layers[0] != unit.index:
            shapes = {key: self._spec.checkpoint.entries[key].shape for key in unit.keys}
            self._layers = (unit.index, self._skeleton.linear_layers(unit.index, unit.keys, shapes)[0])
        return self._layers[1]

    def is_exact_in(self, unit: BlockUnit, dtype: torch.dtype) -> bool:
        """Tell whether a block's smoothed weights are held exactly by a dtype that holds its own.

        Args:
            unit: Unit of the block.
            dtype: The dtype.
        """
        inputs = [smoothed for smoothed in self.inputs(unit) if smoothed.changes]
        exact = all(s.columns.are_powers_of_two and s.rows.are_powers_of_two for s in inputs)
        return not inputs or (exact and dtype != torch.float16)

    def applied(self, unit: BlockUnit, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors of a block as its smoothed inputs want them.

        Args:
            unit: Unit of the block.
            tensors: Tensors of the source by name, all of the block's or some.
        """
        return self.with_inputs(unit, tensors, self.inputs(unit))

    def with_inputs(
        self, unit: BlockUnit, tensors: Mapping[str, torch.Tensor], inputs: Sequence[SmoothedInput]
    ) -> dict[str, torch.Tensor]:
        """Return tensors of a block as some smoothed inputs want them, which may be yet to be decided.

        Args:
            unit: Unit of the block.
            tensors: Tensors of the source by name, all of the block's or some.
            inputs: What is smoothed.
        """
        if not any(smoothed.changes for smoothed in inputs):
            return dict(tensors)
        return smoothed_tensors(tensors, inputs, self.layers(unit), unit.by_name)
