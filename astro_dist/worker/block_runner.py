"""The block that a worker holds on its device: which one is loaded, and what it makes of hidden states."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch.utils.hooks import RemovableHandle

from astro.activation_config import ActivationScheme
from astro.errors import CheckpointError
from astro.model.activations import BlockLayers
from astro.model.block_call import BlockState, forward
from astro.model.cache_scales import CacheScales
from astro.model.low_rank import attach
from astro.model.rounded_inputs import rounded_inputs
from astro.model.skeleton import Skeleton
from astro.process import return_freed_memory
from astro.quantization.recipe import Recipe
from astro.storage.device_copies import DeviceCopies
from astro_dist.planning.devices import reads_weights_ahead
from astro_dist.planning.units import BlockUnit
from astro_dist.schedule.names import ORIGINAL
from astro_dist.schedule.wave_call import WaveCall
from astro_dist.worker.block_cache import BlockCache
from astro_dist.worker.block_recipe import block_recipe, stored_dtype
from astro_dist.worker.chunk_tokens import ChunkTokens
from astro_dist.worker.device_check import require_memory
from astro_dist.worker.hidden_states import HiddenStates
from astro_dist.worker.recorded_calls import RecordedCalls
from astro_dist.worker.same_files import require_same_files
from astro_dist.worker.smoothed_block import SmoothedBlocks
from astro_dist.worker.spec import WorkerSpec
from astro_dist.worker.stored_weights import StoredWeights

__all__ = ["BlockRunner"]

_SOURCE, _TRIED = "source", "tried"
"""What is loaded where it is no block of a stream: one of the source before it is smoothed, or one that is tried."""
_OUTSIDE = ("outside", -1)
"""What is loaded where it is no block: embeddings, norm and head."""


class BlockRunner:
    """Loads blocks and runs them; it holds at most one, of the source or of what a round wrote, or what is around them.

    Attributes:
        spec: What the worker was built from, with a checkpoint that decodes on the device.
        device: Device on which the block is.
        skeleton: The model, on the meta device but for what is loaded.
        smoothed: What was decided about the inputs of blocks.
        cache: What servers would cache of the loaded block.
        states: Hidden states of chunks before each block.
        tokens: Tokens of chunks.
        calls: What blocks are called with.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        """Open the source.

        Args:
            spec: What the worker was built from.

        Raises:
            RunError: This machine does not see the run directory, sees another source than the driver, or has too
                little memory.
        """
        self.device = torch.device(spec.device)
        require_same_files(spec)
        require_memory(spec.needed_bytes, self.device)
        self.spec = spec = replace(spec, checkpoint=spec.checkpoint.decoding_on(self.device))
        self.skeleton = Skeleton(spec.folder, spec.compute_dtype, spec.trust_remote_code)
        self.smoothed = SmoothedBlocks(spec, self.skeleton)
        self.cache = BlockCache(spec, self.skeleton)
        copies = DeviceCopies(self.device)
        self.states = HiddenStates(spec.run, copies)
        self.tokens = ChunkTokens(spec.run, self.device)
        self.calls = RecordedCalls(spec.run, self.device)
        self._weights = StoredWeights(spec, self.device, copies)
        self._loaded: tuple[str, int] | None = None
        self._corrected: list[RemovableHandle] = []
        self._layers: tuple[int, BlockLayers] | None = None

    def load(self, stream: str, index: int) -> BlockUnit:
        """Bring a block onto the device, if it is not there already.

        Args:
            stream: Stream of the model: `original` for the source, `round-r` for what that round wrote.
            index: Index of the block.

        Returns:
            The unit of the block.

        Raises:
            CheckpointError: A tensor is missing, or holds NaN or Inf.
            DamagedError: The shard of the round is missing, or not as it was written.
        """
        unit = self.spec.plan.blocks[index]
        if self._loaded == (stream, index):
            return unit
        self.close()
        if stream == ORIGINAL:
            tensors = self.smoothed.applied(unit, self._weights.of_source(unit))
        else:
            tensors = self._weights.of_result(stream, unit)
        self._fill(unit, tensors, (stream, index))
        return unit

    def load_source(self, index: int) -> BlockUnit:
        """Bring a block of the source onto the device as it is, before it is decided how its inputs are smoothed.

        Args:
            index: Index of the block.

        Returns:
            The unit of the block.

        Raises:
            CheckpointError: A tensor is missing, or holds NaN or Inf.
        """
        unit = self.spec.plan.blocks[index]
        if self._loaded != (_SOURCE, index):
            self.close()
            self._fill(unit, self._weights.of_source(unit), (_SOURCE, index))
        return unit

    def load_tensors(self, unit: BlockUnit, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Bring a block with other tensors onto the device, to try it. Nobody takes it for a block of a stream.

        Args:
            unit: Unit of the block.
            tensors: Tensors of the block by their names in the source.
            dtype: Dtype of its parameters.
        """
        self.close()
        self._fill(unit, tensors, (_TRIED, unit.index), dtype)

    def _fill(
        self,
        unit: BlockUnit,
        tensors: Mapping[str, torch.Tensor],
        place: tuple[str, int],
        dtype: torch.dtype | None = None,
    ) -> None:
        stream, index = place
        block = self.skeleton.blocks[index]
        self.skeleton.load(block, tensors, self.device, dtype)
        self.skeleton.require_filled(block, f"block {index + 1}")
        self._loaded = place
        corrections = self._weights.corrections(stream, unit)
        self._corrected = attach(self.skeleton.model, corrections, self.spec.compute_dtype)
        for name, parameter in block.named_parameters():
            # NaN passes through minimum and maximum, which need no memory of the parameter's size.
            if parameter.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(parameter.detach()))).all()):
                of_source = stream in (ORIGINAL, _SOURCE, _TRIED)
                origin = str(self.spec.checkpoint.store) if of_source else f"the shard of {stream}"
                raise CheckpointError(f"{origin}: {name} of block {index + 1} holds NaN or Inf")

    def expect_block(self, index: int) -> None:
        """Begin to read the weights of a block of the source that will probably be loaded next, where there is room.

        The memory of the host is free for them while a GPU computes; a CPU computes in it.

        Args:
            index: Index of the block.
        """
        if reads_weights_ahead(self.device.type):
            self._weights.expect(self.spec.plan.blocks[index])

    def expect_following(self, call: WaveCall) -> None:
        """Begin to read the weights of the block that a call says will follow, if it says so; see `expect_block`.

        Args:
            call: The call, whose own weights are loaded.
        """
        if call.following is not None:
            self.expect_block(call.following)

    def close(self) -> None:
        """Take the block off the device."""
        self.states.forget()
        self.cache.forget()
        while self._corrected:
            self._corrected.pop().remove()
        if self._loaded is None:
            return
        if self._loaded == _OUTSIDE:
            self.skeleton.model.to("meta")
            self.skeleton.model.tie_weights()
        else:
            self.skeleton.unload(self.skeleton.blocks[self._loaded[1]])
        self._loaded = None
        self.calls.clear()
        return_freed_memory()

    def load_outside(self) -> None:
        """Bring embeddings, norm and head onto the device, if they are not there already."""
        if self._loaded != _OUTSIDE:
            self.close()
            self._fill_outside(self._weights.outside())

    @contextmanager
    def outside_loaded(self, with_block: BlockUnit | None = None) -> Iterator[None]:
        """Hold embeddings, norm and head on the device while the body of a `with` statement runs.

        Args:
            with_block: Block of the source that is loaded with them, if any.
        """
        self.close()
        self._fill_outside(self._weights.outside() | self.spec.checkpoint.read(with_block.keys if with_block else ()))
        try:
            yield
        finally:
            self.close()

    def _fill_outside(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.skeleton.load(self.skeleton.model, tensors, self.device)
        self.skeleton.tie()
        self._loaded = _OUTSIDE

    def layers(self, unit: BlockUnit) -> BlockLayers:
        """Return the layers of a block that are quantized, as they lie in the model.

        Args:
            unit: Unit of the block.
        """
        if self._layers is None or self._layers[0] != unit.index:
            self._layers = (unit.index, BlockLayers(self.skeleton.model, unit.linears))
        return self._layers[1]

    def recipe(self, unit: BlockUnit) -> Recipe:
        """Return how a block's layers are quantized.

        Args:
            unit: Unit of the block.

        Raises:
            DamagedError: What was decided about its inputs is missing, or not as it was written.
        """
        return block_recipe(self.spec, unit, self.smoothed.inputs(unit))

    def weights(self, unit: BlockUnit, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the exact original weights of some of a block's layers by name, smoothed if they are, on the device.

        The loaded weights are taken if the block is loaded and its dtype holds the stored weights exactly. Otherwise
        they are read.

        Args:
            unit: Unit of the block.
            names: Names of the layers.
        """
        linears = [unit.by_name[name] for name in names]
        exact = torch.promote_types(stored_dtype(self.spec, unit), self.spec.compute_dtype) == self.spec.compute_dtype
        exact = exact and self.smoothed.is_exact_in(unit, self.spec.compute_dtype)
        if self._loaded == (ORIGINAL, unit.index) and exact:
            layers = self.layers(unit)
            return {linear.name: layers.weight(linear.name) for linear in linears}
        read = self.smoothed.applied(unit, self.spec.checkpoint.read({linear.key for linear in linears}))
        return {linear.name: linear.stored(read[linear.key]).to(self.device) for linear in linears}

    def forward(self, index: int, state: BlockState, chunk: str) -> BlockState:
        """Return what the loaded block makes of the state before it.

        Args:
            index: Index of the block.
            state: State before the block.
            chunk: Name of the chunk.
        """
        call = self.calls.call(index, chunk, self.tokens.shape(chunk))
        return forward(self.skeleton.blocks[index], state, call)

    @contextmanager
    def serving(
        self, stream: str, unit: BlockUnit, cache_scales: Mapping[str, CacheScales] | None = None
    ) -> Iterator[None]:
        """Let the loaded block compute as servers do in the body of a `with` statement, which runs whole forwards.

        Args:
            stream: Stream of the model; that of the source rounds nothing.
            unit: Unit of the block.
            cache_scales: Scales of keys and values by the attention module's name in the model; None for those in the
                record of the block, which is finished then.

        Raises:
            DamagedError: The record of the block cannot be read.
        """
        scales = self.cache.recorded_scales(stream, unit.index) if cache_scales is None else cache_scales
        with self.rounding(stream, unit), self.cache.rounding(scales):
            yield

    def served(self, stream: str) -> ActivationScheme | None:
        """Return the kind of grid to which a stream rounds the inputs of quantized layers; the source's rounds nothing.

        Args:
            stream: Stream of the model.
        """
        return None if stream == ORIGINAL else self.spec.activations.scheme

    def rounding(self, stream: str, unit: BlockUnit, is_whole: bool = True) -> AbstractContextManager[None]:
        """Return a context in which the loaded block rounds the inputs of its quantized layers as the stream does.

        Args:
            stream: Stream of the model.
            unit: Unit of the block.
            is_whole: Whether whole forwards are run in it.
        """
        return rounded_inputs(self.layers(unit), self.served(stream), is_whole)

    def repeats(
        self,
        stream: str,
        index: int,
        cache_scales: Mapping[str, CacheScales] | None = None,
        start: str | None = None,
    ) -> list[Callable[[], object]]:
        """Return a forward of the loaded block for every calibration chunk, whose output is not kept.

        Args:
            stream: Stream of the model, which says how servers round.
            index: Index of the block.
            cache_scales: Scales of keys and values, see `serving`.
            start: Stream whose hidden states are the input; None where it is the same.
        """
        unit = self.spec.plan.blocks[index]

        def repeat(chunk: str) -> None:
            with self.serving(stream, unit, cache_scales):
                self.forward(index, self.states.read(start or stream, index, chunk), chunk)

        return [partial(repeat, chunk) for chunk in self.spec.calibration_chunks]
