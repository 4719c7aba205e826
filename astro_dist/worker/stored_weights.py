"""The weights that a worker loads: of the source's blocks, of what a round wrote, and of what is outside the blocks."""

import torch

from astro.formats import LAYOUTS, peft_adapter
from astro.formats.block_shard import unpack_block
from astro.model.low_rank import LowRank
from astro.storage.atomic import load_tensors
from astro.storage.byte_store import FolderStore
from astro.storage.device_copies import DeviceCopies
from astro_dist.planning.units import BlockUnit
from astro_dist.run_directory.layer_widths import layer_schemes
from astro_dist.schedule.names import block_unit, round_of_stream
from astro_dist.worker.prefetch import ReadAhead
from astro_dist.worker.spec import WorkerSpec

__all__ = ["StoredWeights"]


class StoredWeights:
    """Reads weights, those of one block of the source ahead of time."""

    def __init__(self, spec: WorkerSpec, device: torch.device, copies: DeviceCopies) -> None:
        """Begin with nothing read.

        Args:
            spec: What the worker was built from.
            device: Device that unpacks what a round wrote.
            copies: Copies to the device, which want the memory of what is read ahead to be pinned.
        """
        self._spec, self._device, self._copies = spec, device, copies
        self._ahead: ReadAhead[int, dict[str, torch.Tensor]] = ReadAhead()

    def expect(self, unit: BlockUnit) -> None:
        """Begin to read the tensors of a block of the source.

        Args:
            unit: Unit of the block.
        """
        self._ahead.expect(unit.index, lambda: self._copies.pinned(self._spec.checkpoint.read(unit.keys)))

    def of_source(self, unit: BlockUnit) -> dict[str, torch.Tensor]:
        """Return the tensors of a block of the source by key, which may have been read already.

        Args:
            unit: Unit of the block.
        """
        tensors = self._ahead.take(unit.index)  # those of another block are let go of
        return self._spec.checkpoint.read(unit.keys) if tensors is None else tensors

    def of_result(self, stream: str, unit: BlockUnit) -> dict[str, torch.Tensor]:
        """Return the tensors of a block that a round wrote by the keys of the source, on the device.

        Args:
            stream: Stream through what the round wrote.
            unit: Unit of the block.

        Raises:
            DamagedError: The shard is missing, or not as it was written.
        """
        spec, round_index = self._spec, round_of_stream(stream)
        assert round_index is not None
        if self._ahead.reading(unit.index + 1) is None:  # in mode `sequential` the next block's come behind it
            self._ahead.forget()
        spec.run.require_intact(block_unit(round_index, unit.index))
        tensors, _ = load_tensors(spec.run.shard(round_index, unit.file))
        by_name = layer_schemes(spec.run, spec.quantization, unit, round_index)
        schemes = {linear: by_name[linear.name] for linear in unit.linears}
        shapes = {key: spec.checkpoint.entries[key].shape for key in unit.keys}
        layout = LAYOUTS[spec.quantization.format]
        return unpack_block(layout, schemes, tensors, shapes, spec.compute_dtype, self._device)

    def corrections(self, stream: str, unit: BlockUnit) -> dict[str, LowRank]:
        """Return the corrections of low rank that belong to a block that a round wrote by layer, on the device.

        Args:
            stream: Stream through what the round wrote; the source has no corrections.
            unit: Unit of the block, which `of_result` has found to be intact.
        """
        spec, round_index = self._spec, round_of_stream(stream)
        if round_index is None or not spec.reconstruction.is_on:
            return {}
        path = spec.run.corrections(round_index, unit.file)
        names = {file.name for file in spec.run.files(block_unit(round_index, unit.index))}
        if str(path.relative_to(spec.run.root)) not in names:
            return {}  # a block of experts alone, or without any quantized layer
        corrections = peft_adapter.unpack(load_tensors(path)[0])
        return {name: correction.to(self._device) for name, correction in corrections.items()}

    def outside(self) -> dict[str, torch.Tensor]:
        """Return embeddings, norm and head by key; of a remote source what was copied of it is read instead."""
        self._ahead.forget()
        spec = self._spec
        wanted, tensors = set(spec.plan.outside), dict[str, torch.Tensor]()
        for unit in spec.plan.copies:
            is_near = isinstance(spec.checkpoint.store, FolderStore)
            if not is_near and wanted.intersection(unit.keys) and spec.run.finished(unit.name):
                copied, _ = load_tensors(spec.run.model / unit.file)
                tensors |= {key: copied[key] for key in wanted.intersection(copied)}
        return tensors | spec.checkpoint.read(wanted - tensors.keys())
