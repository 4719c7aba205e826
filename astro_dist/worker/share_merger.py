"""What the shares of a block's statistics add up to, and what replaces the sums of experts that few tokens reached."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from astro.calibration.drift import DriftAccumulator
from astro.calibration.input_sums import InputSums
from astro.calibration.starved_experts import (
    AllTokens,
    InputStatistics,
    is_starved,
    starved_statistics,
    sufficient_statistics,
)
from astro.linalg.batching import stacked
from astro.model.cache_scales import LargestByModule
from astro.model.operands import Operand
from astro.timing import add_seconds
from astro_dist.planning.devices import reads_weights_ahead
from astro_dist.schedule.names import ORIGINAL, SUM, round_stream, share_part
from astro_dist.schedule.sequential import shares
from astro_dist.worker.batch_statistics import BatchStatistics, MergedSums, merge_share_, read_sum, save_sum
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.prefetch import ReadAhead
from astro_dist.worker.solved_stages import put_in, solved_before
from astro_dist.worker.split_block import BlockInParts
from astro_dist.worker.summed_inputs import SummedInputs

__all__ = ["ShareMerger"]

_Part = tuple[dict[str, torch.Tensor], Any]
"""Tensors and note of a share."""


@dataclasses.dataclass(frozen=True)
class _Substitute:
    """What the starved experts of a stage share: every token's way through them, or the sums of all experts."""

    block: BlockInParts
    stage: int
    source: AllTokens | InputSums


class ShareMerger:
    """Adds up the shares of a batch's statistics, in their order."""

    def __init__(self, runner: BlockRunner, inputs: SummedInputs) -> None:
        """Begin with nothing.

        Args:
            runner: Runner of the worker's blocks.
            inputs: What is summed of the inputs of these blocks.
        """
        self._runner, self._inputs = runner, inputs
        self._ahead: ReadAhead[tuple[BlockInParts, int, int], _Part] = ReadAhead()
        self.forget()

    def forget(self) -> None:
        """Let go of what was gathered for starved experts."""
        self._substitute: _Substitute | None = None

    def merge(self, block: BlockInParts, batch: int) -> BatchStatistics:
        """Return the statistics of a batch, added up from its shares where the sums are not written yet.

        Args:
            block: The block.
            batch: Index of the batch.

        Raises:
            DamagedError: A part is missing, or not as it was written.
            NumericalError: Too few tokens reached an expert, and the policy is `fail`.
        """
        if block.is_there(batch, SUM) and not block.is_there(batch, share_part(0)):
            return read_sum(block, batch, self._runner.device)
        seconds: dict[str, float] = {}
        finished: list[InputStatistics] = []
        spreads: list[torch.Tensor] = []
        merged, operands = self._merged(block, batch, seconds), self._inputs.operands(block, batch)
        for names, operand in zip(block.batches[batch], operands, strict=True):
            of_group = merged.pop(0)
            sums, even = of_group.sums, of_group.even
            del of_group
            if sums.drift is not None and even is not None:
                # It is needed once, after the Hessian is factored, which takes the device's memory.
                spreads.append(sums.spread_(even).cpu())
            del even
            statistics = self._statistics(block, batch, names, operand, sums)
            del sums
            energy = self._inputs.token_weights(block).energy_of(operand)
            finished.append(dataclasses.replace(statistics, gradient_energy=energy))
        written = save_sum(block, batch, finished, seconds, self._largest(block, batch))
        return dataclasses.replace(written, spread=stacked(spreads)) if spreads else written

    def _largest(self, block: BlockInParts, batch: int) -> LargestByModule:
        """The largest keys and values in all shares, if the batch is in the first stage and servers round them."""
        largest, spec = LargestByModule(), self._runner.spec
        for share in range(len(shares(spec.chunks, spec.shares)) if spec.activations.rounds_cache else 0):
            largest.absorb_(block.largest(batch, share_part(share)))
        return largest

    def _merged(self, block: BlockInParts, batch: int, seconds: dict[str, float]) -> list[MergedSums]:
        """A batch's sums over all shares, in their order; the time that those took is added to `seconds`.

        The drift over the even shares is summed where the share to make up for is measured.
        """
        spec, device = self._runner.spec, self._runner.device
        count = len(shares(spec.chunks, spec.shares))
        halves = spec.quantization.compensation == "auto" and count > 1
        merged: list[MergedSums] = []
        for operand in self._inputs.operands(block, batch):
            sums = self._inputs.empty(block, operand)
            is_halved = halves and sums.drift is not None
            merged.append(MergedSums(sums, DriftAccumulator(operand.columns, device) if is_halved else None))
        try:
            for share in range(count):
                part = self._read(block, batch, share, count)
                add_seconds(seconds, merge_share_(part, block.columns(batch), share % 2 == 0, merged, device))
                del part  # before the one behind the next is read
        finally:
            self._ahead.forget()
        return merged

    def _read(self, block: BlockInParts, batch: int, share: int, count: int) -> _Part:
        """Tensors and note of a share of a batch. Where there is room the next one is read while it is added."""
        part = self._ahead.take((block, batch, share)) or block.load(batch, share_part(share))
        # A CPU adds in the memory that this would take.
        if share + 1 < count and reads_weights_ahead(self._runner.device.type):
            self._ahead.expect((block, batch, share + 1), partial(block.load, batch, share_part(share + 1)))
        return part

    def _statistics(
        self, block: BlockInParts, batch: int, names: Sequence[str], operand: Operand, sums: InputSums
    ) -> InputStatistics:
        """Finish an input group whose shares are merged, or replace its sums if too few tokens reached an expert."""
        runner, experts = self._runner, self._runner.spec.experts
        if not is_starved(operand, sums.num_tokens, experts):
            return sufficient_statistics(names, sums)
        instead: InputSums | None = None
        if experts.policy == "all-tokens":
            runner.load(ORIGINAL, block.unit.index)
            with put_in(runner, block.unit, solved_before(runner, block, block.stage_of(batch))):
                all_tokens = self._gathered(block, batch, operand)
                if isinstance(all_tokens, AllTokens):
                    instead = all_tokens.sums(operand, runner.device)
        elif experts.policy == "shared-hessian":
            shared = self._gathered(block, batch, operand)
            instead = shared if isinstance(shared, InputSums) else None
        return starved_statistics(operand, sums.num_tokens, experts, instead, runner.device)

    def _gathered(self, block: BlockInParts, batch: int, operand: Operand) -> AllTokens | InputSums:
        """What replaces the sums of the starved experts of a batch's stage; it is gathered for the first of them."""
        stage, substitute = block.stage_of(batch), self._substitute
        if substitute is None or (substitute.block, substitute.stage) != (block, stage):
            self._substitute = substitute = None  # makes room
            runner, stream = self._runner, round_stream(0)
            source: AllTokens | InputSums
            if runner.spec.experts.policy == "all-tokens":
                scales = block.cache_scales if stage else self._largest(block, batch).scales
                repeats = runner.repeats(stream, block.unit.index, scales)
                kind, served = runner.spec.token_weights, runner.served(stream)
                source = AllTokens(runner.layers(block.unit), [operand], repeats, kind, self._inputs.kind, served)
            else:
                source = self._inputs.empty(block, operand, keep_inputs=False)
                for batch in block.stages[stage]:
                    for of_group in self._merged(block, batch, {}):
                        source.absorb_(of_group.sums)
            self._substitute = substitute = _Substitute(block, stage, source)
        return substitute.source
