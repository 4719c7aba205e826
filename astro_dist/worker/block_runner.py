"""The block that a worker holds on its device, and the hidden states that pass through it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from astro.activation_config import ActivationScheme
from astro.calibration.input_sums import SumKind
from astro.errors import CheckpointError
from astro.formats import LAYOUTS, peft_adapter
from astro.formats.block_shard import kept_keys, pack_block
from astro.model.activations import BlockLayers, Operand
from astro.model.block_call import BlockState, forward
from astro.model.cache_scales import CacheScales
from astro.model.call_file import Recording
from astro.model.low_rank import attach, takes_correction
from astro.model.rounded_inputs import rounded_inputs
from astro.model.skeleton import Skeleton
from astro.process import return_freed_memory
from astro.quantization.grid import QuantizedLinear
from astro.quantization.recipe import Corrections, Recipe
from astro.storage.atomic import save_tensors
from astro.storage.checked_tensors import load_part
from astro.storage.device_copies import DeviceCopies
from astro.storage.part_writer import PartWriter
from astro_dist.planning.devices import reads_weights_ahead
from astro_dist.planning.units import BlockUnit
from astro_dist.schedule.names import ORIGINAL, is_held_out
from astro_dist.worker.block_cache import BlockCache
from astro_dist.worker.device_check import require_memory
from astro_dist.worker.hidden_samples import sample_of
from astro_dist.worker.prefetch import Prefetch
from astro_dist.worker.recorded_calls import RecordedCalls
from astro_dist.worker.same_files import require_same_files
from astro_dist.worker.smoothed_block import SmoothedBlocks
from astro_dist.worker.spec import WorkerSpec
from astro_dist.worker.stored_weights import StoredWeights

__all__ = ["BlockRunner"]

_SOURCE, _TRIED = "source", "tried"
"""What is loaded where it is no block of a stream: one of the source before it is smoothed, or one that is tried."""
_HIDDEN = "hidden"
"""Name of the hidden states in a file; other tensors beside them have the names that `BlockState` gives them."""


class BlockRunner:
    """Loads blocks and runs them; it holds at most one, of the source or of what a round wrote.

    Attributes:
        spec: What the worker was built from.
        device: Device on which the block is.
        checkpoint: Checkpoint of the source.
        skeleton: The model, on the meta device but for what is loaded.
        smoothed: What was decided about the inputs of blocks.
        cache: What servers would cache of the loaded block.
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
        self.checkpoint = spec.checkpoint
        self.skeleton = Skeleton(spec.folder, spec.compute_dtype, spec.trust_remote_code)
        self.smoothed = SmoothedBlocks(spec, self.skeleton)
        self.cache = BlockCache(spec, self.skeleton)
        copies = DeviceCopies(self.device)
        self._prefetch, self._writer = Prefetch(copies), PartWriter(copies)
        self._weights = StoredWeights(spec, self.device, copies)
        self._tokens: dict[str, torch.Tensor] | None = None
        self._loaded: tuple[str, int] | None = None
        self._corrected: list[RemovableHandle] = []
        self._layers: tuple[int, BlockLayers] | None = None
        self._calls = RecordedCalls(spec.run, self.device)

    @property
    def held_out(self) -> list[str]:
        """The names of the chunks that are only measured on."""
        return [chunk for chunk in self.spec.chunks if is_held_out(chunk)]

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
                origin = str(self.checkpoint.store) if of_source else f"the shard of {stream}"
                raise CheckpointError(f"{origin}: {name} of block {index + 1} holds NaN or Inf")

    def expect_block(self, index: int) -> None:
        """Begin to read the weights of a block of the source that will probably be loaded next, where there is room.

        The memory of the host is free for them while a GPU solves; a CPU solves in it.

        Args:
            index: Index of the block.
        """
        if reads_weights_ahead(self.device.type):
            self._weights.expect(self.spec.plan.blocks[index])

    def close(self) -> None:
        """Take the block off the device."""
        self._prefetch.forget()
        self.cache.forget()
        while self._corrected:
            self._corrected.pop().remove()
        if self._loaded is not None:
            self.skeleton.unload(self.skeleton.blocks[self._loaded[1]])
            self._loaded = None
            self._calls.clear()
            return_freed_memory()

    @contextmanager
    def outside_loaded(self, with_block: BlockUnit | None = None) -> Iterator[None]:
        """Hold embeddings, norm and head on the device while the body of a `with` statement runs.

        Args:
            with_block: Block of the source that is loaded with them, if any.
        """
        self.close()
        skeleton = self.skeleton
        tensors = self._weights.outside() | self.checkpoint.read(with_block.keys if with_block else ())
        skeleton.load(skeleton.model, tensors, self.device)
        skeleton.tie()
        try:
            yield
        finally:
            skeleton.model.to("meta")
            skeleton.model.tie_weights()
            return_freed_memory()

    def layers(self, unit: BlockUnit) -> BlockLayers:
        """Return the layers of a block that are quantized, as they lie in the model.

        Args:
            unit: Unit of the block.
        """
        if self._layers is None or self._layers[0] != unit.index:
            self._layers = (unit.index, BlockLayers(self.skeleton.model, unit.linears))
        return self._layers[1]

    def weights(self, unit: BlockUnit, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the exact original weights of some of a block's layers by name, smoothed if they are, on the device.

        The loaded weights are taken if the block is loaded and its dtype holds the stored weights exactly. Otherwise
        they are read.

        Args:
            unit: Unit of the block.
            names: Names of the layers.
        """
        linears = [unit.by_name[name] for name in names]
        exact = torch.promote_types(self._stored_dtype(unit), self.spec.compute_dtype) == self.spec.compute_dtype
        exact = exact and self.smoothed.is_exact_in(unit, self.spec.compute_dtype)
        if self._loaded == (ORIGINAL, unit.index) and exact:
            layers = self.layers(unit)
            return {linear.name: layers.weight(linear.name) for linear in linears}
        read = self.smoothed.applied(unit, self.checkpoint.read({linear.key for linear in linears}))
        return {linear.name: linear.stored(read[linear.key]).to(self.device) for linear in linears}

    def recipe(self, unit: BlockUnit) -> Recipe:
        """Return how a block's layers are quantized.

        Scales are stored in the layout's dtype, or, where it has none, in that of the block's weights in the source.
        Corrections have 16 bits: in that dtype too, or in bfloat16 where the source has float32.

        Args:
            unit: Unit of the block.
        """
        spec = self.spec
        layout_dtype: torch.dtype | None = LAYOUTS[spec.quantization.format].SCALE_DTYPE
        scale_dtype = layout_dtype if layout_dtype is not None else self._stored_dtype(unit)
        corrections = None
        if spec.reconstruction.is_on:
            layers = frozenset(linear.name for linear in unit.linears if takes_correction(linear))
            stored = self._stored_dtype(unit)
            dtype = stored if stored.itemsize == 2 else torch.bfloat16  # which has the range of float32
            wants_rounded = spec.activations.has_clips and not spec.quantization.makes_up_for_rounding(
                spec.activations.bits
            )
            corrections = Corrections(spec.reconstruction, layers, dtype, wants_rounded)
        return Recipe(spec.quantization, spec.regularization, scale_dtype, spec.tile_elements, corrections)

    def sum_kind(self, operand: Operand, has_drift: bool = False) -> SumKind:
        """Return what is summed of the inputs of an operand over the calibration tokens.

        Errors made before experts are not compensated, because the tokens that reach one are not the same in the source
        model. What rounding does to the inputs that do reach it is, but by no correction, which experts do not have.

        Args:
            operand: The operand.
            has_drift: Whether the drift from the source is summed outside experts.
        """
        spec, is_expert = self.spec, operand.expert is not None
        return SumKind(
            operand.grid(spec.activations.scheme),
            has_drift and not is_expert,
            has_rounding_drift=spec.quantization.makes_up_for_rounding(spec.activations.bits),
            has_correction_drift=spec.reconstruction.minds_rounding(spec.activations) and not is_expert,
        )

    def _stored_dtype(self, unit: BlockUnit) -> torch.dtype:
        """Dtype of a block's weights in the source."""
        dtypes = [self.checkpoint.entries[linear.key].float_dtype for linear in unit.linears]
        return dtypes[0] or self.spec.compute_dtype if dtypes else self.spec.compute_dtype

    def widths(self, round_index: int) -> tuple[int, ...]:
        """Return the widths that a round measures besides: only the first measures, if there is a width budget.

        Args:
            round_index: Index of the round.
        """
        quantization = self.spec.quantization
        return quantization.bit_choices if quantization.bits == "auto" and round_index == 0 else ()

    def write_block(self, unit: BlockUnit, round_index: int, quantized: dict[str, QuantizedLinear]) -> list[Path]:
        """Write a block's shard: packed layers, and every other tensor as it was, or as smoothed inputs want it.

        Corrections have a file of their own.

        Args:
            unit: Unit of the block.
            round_index: Index of the round.
            quantized: Every quantized layer by name.

        Returns:
            The paths of the files.
        """
        corrections = {name: layer.correction for name, layer in quantized.items() if layer.correction}
        layout = LAYOUTS[self.spec.quantization.format]
        kept = self.smoothed.applied(unit, self.checkpoint.read(kept_keys(unit.linears, unit.keys)))
        tensors = pack_block(layout, unit.linears, quantized, kept, self.recipe(unit).scale_dtype, self.device)
        path = self.spec.run.shard(round_index, unit.file)
        save_tensors(path, tensors)
        if not corrections:
            return [path]
        beside = self.spec.run.corrections(round_index, unit.file)
        save_tensors(beside, peft_adapter.pack(corrections))
        return [path, beside]

    def forward(self, index: int, state: BlockState, chunk: str) -> BlockState:
        """Return what the loaded block makes of the state before it.

        Args:
            index: Index of the block.
            state: State before the block.
            chunk: Name of the chunk.
        """
        call = self._calls.call(index, chunk, self._tokens_of(chunk).shape)
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
        self, stream: str, index: int, cache_scales: Mapping[str, CacheScales] | None = None
    ) -> list[Callable[[], object]]:
        """Return a forward of the loaded block for every calibration chunk, whose output is not kept.

        Args:
            stream: Stream whose hidden states are the input.
            index: Index of the block.
            cache_scales: Scales of keys and values, see `serving`.
        """
        unit = self.spec.plan.blocks[index]

        def repeat(chunk: str) -> None:
            with self.serving(stream, unit, cache_scales):
                self.forward(index, self.state(stream, index, chunk), chunk)

        return [partial(repeat, chunk) for chunk in self.spec.chunks if not is_held_out(chunk)]

    def input_ids(self, chunk: str) -> torch.Tensor:
        """Return the tokens of a chunk, int64 [B, T].

        Args:
            chunk: Name of the chunk.
        """
        return self._tokens_of(chunk).to(self.device)

    def recording(self, chunk: str) -> Recording:
        """Return what was seen of all blocks when chunks of a chunk's shape were embedded.

        Args:
            chunk: Name of the chunk.
        """
        return self._calls.recording(self._tokens_of(chunk).shape)

    def state(self, stream: str, index: int, chunk: str, then: tuple[str, str] | None = None) -> BlockState:
        """Return the state of a chunk before a block.

        Args:
            stream: Stream in which the chunk travels.
            index: Index of the block.
            chunk: Name of the chunk.
            then: Stream and name of the chunk that will be wanted next before the same block, which is read meanwhile.

        Raises:
            DamagedError: The file is missing, or not as it was written.
        """
        state = self.states((stream, index, chunk))[0]
        if then is not None:
            self.expect_states((then[0], index, then[1]))
        return state

    def states(self, *places: tuple[str, int, str]) -> list[BlockState]:
        """Return several states at once.

        Args:
            places: Stream, index of the block and name of the chunk of each.

        Raises:
            DamagedError: A file is missing, or not as it was written.
        """
        tensors = self._prefetch.take(*(self.spec.run.hidden(*place) for place in places))
        return [BlockState(of_place.pop(_HIDDEN), of_place) for of_place in tensors]

    def expect_states(self, *places: tuple[str, int, str]) -> "Future[Any] | None":
        """Begin to read the states that will be wanted next; `states` returns them.

        Args:
            places: Stream, index of the block and name of the chunk of each.

        Returns:
            The reading of the states; None where not all of them are there yet.
        """
        paths = [self.spec.run.hidden(*place) for place in places]
        self._prefetch.expect(*paths)
        return self._prefetch.reading(*paths)

    def save_state(self, stream: str, index: int, chunk: str, state: BlockState) -> None:
        """Begin to write the state of a chunk before a block, unless it is there: other hardware may round otherwise.

        Of a chunk that is held out, a sample is kept longer than the state.

        Args:
            stream: Stream in which the chunk travels.
            index: Index of the block.
            chunk: Name of the chunk.
            state: The state, which nobody may change before `finish_writing` has returned.
        """
        path = self.spec.run.hidden(stream, index, chunk)
        if not path.exists():
            if index and is_held_out(chunk):
                self.begin_writing(self.spec.run.sample(stream, index, chunk), sample_of(state.hidden))
            self.begin_writing(path, {_HIDDEN: state.hidden, **state.others})

    def begin_writing(self, path: Path, tensors: Mapping[str, torch.Tensor], note: str = "") -> None:
        """Begin to write a file that other calls will read.

        Args:
            path: Where the file belongs.
            tensors: Tensors by name, which nobody may change before `finish_writing` has returned.
            note: Text that is kept beside the tensors.

        Raises:
            StorageError: A file that was begun before could not be written.
        """
        self._writer.begin(path, tensors, note)

    @property
    def writing(self) -> "Future[None] | None":
        """The file that was begun last; None where every file is whole."""
        return self._writer.last

    def finish_writing(self) -> None:
        """Wait until every file that was begun is whole.

        Raises:
            StorageError: One of them could not be written.
        """
        self._writer.finish()

    def give_up_writing(self) -> None:
        """Wait until nothing is written any more: the call that began it has failed."""
        self._writer.give_up()

    def _tokens_of(self, chunk: str) -> torch.Tensor:
        if self._tokens is None:
            self._tokens, _ = load_part(self.spec.run.tokens)
        return self._tokens[chunk]
