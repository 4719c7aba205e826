"""The statistics of a block that several workers solve: shares of the calibration chunks, and what they add up to.

In mode `sequential` the groups of a block come in stages that follow its forward: a stage's inputs already hold the
errors of the stages before. A share is a fixed part of the chunks; sums are formed in the order of the shares.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from astro.calibration.block_statistics import inputs_of
from astro.calibration.hessian import DriftAccumulator, HessianAccumulator
from astro.calibration.starved_experts import AllTokens, InputStatistics, exhaust, is_starved, starved_statistics
from astro.linalg.batching import stacked
from astro.linalg.symmetric import packed, unpacked
from astro.model.activations import Operand
from astro.timing import add_seconds, timed
from astro_dist.schedule.names import ORIGINAL, SUM, round_stream, share_part
from astro_dist.schedule.sequential import shares
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.split_block import BlockInParts

__all__ = ["HessianShares"]

_RESULT = round_stream(0)
_Accumulators = tuple[HessianAccumulator, DriftAccumulator | None]


class HessianShares:
    """Makes shares and adds them up."""

    def __init__(self, runner: BlockRunner) -> None:
        self._runner = runner
        self._instead: tuple[BlockInParts, int, AllTokens | HessianAccumulator] | None = None

    def forget(self) -> None:
        """Let go of what was gathered for starved experts."""
        self._instead = None

    def accumulate(self, block: BlockInParts, stage_index: int, number: int, start: float) -> None:
        """Partial sums of a stage's batches from one share of the calibration chunks, begun at a time."""
        runner = self._runner
        batches = block.stages[stage_index] if block.stages else []
        sums = {batch: [self._accumulators(operand) for operand in self._operands(block, batch)] for batch in batches}
        every = {
            operand: own
            for batch in batches
            for operand, own in zip(self._operands(block, batch), sums[batch], strict=True)
        }
        seconds = {"hessian": 0.0, "compensate": 0.0}
        self._feed(block, stage_index, shares(runner.spec.chunks, runner.spec.shares)[number], every, seconds)
        seconds["forward"] = time.perf_counter() - start - sum(seconds.values())
        every.clear()
        for batch in batches:
            self._save_share(block, batch, number, sums.pop(batch), seconds if batch == batches[0] else {})

    def save_sums(
        self, block: BlockInParts, statistics: Iterable[InputStatistics], seconds: Mapping[str, float]
    ) -> None:
        """Write the sums of all batches of a block that this worker fed.

        Args:
            block: all of its groups in one runner.
            statistics: of every group, finished here, in order.
            seconds: that were spent on the block so far, by phase.
        """
        remaining = iter(statistics)
        for batch, groups in enumerate(block.batches):
            known = [next(remaining) for _ in groups]
            _save_sum(block, batch, known, None, {} if batch else seconds)
            known.clear()
        exhaust(remaining)

    def of(self, block: BlockInParts, batch: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """A batch's sums and their note, as they were given out, or from its shares.

        Returns:
            `hessian` [B, C, C], with `drift` of the same shape where errors are compensated; and the note.
        """
        if block.is_there(batch, SUM):
            return self.read(block, batch)
        seconds: dict[str, float] = {}
        known, drifts = [], []
        merged = self._merged(block, batch, seconds)
        for names, operand in zip(block.batches[batch], self._operands(block, batch), strict=True):
            H, drift = merged.pop(0)
            known.append(self._statistics(block, batch, names, operand, H))
            drifts += [drift.finish_("+".join(names))] if drift is not None else []
        return _save_sum(block, batch, known, stacked(drifts) if drifts else None, seconds)

    def read(self, block: BlockInParts, batch: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """A batch's sums and their note, as they were written."""
        tensors, note = block.load(batch, SUM)
        H = unpacked(tensors["hessian"].to(self._runner.device), block.columns(batch))
        return {**tensors, "hessian": H}, note

    def _feed(
        self,
        block: BlockInParts,
        stage_index: int,
        chunks: Sequence[str],
        sums: Mapping[Operand, _Accumulators],
        seconds: dict[str, float],
    ) -> None:
        """Pass chunks through the block up to a stage, those of the source too where the drift from it is wanted."""
        layers, quantized = self._runner.layers(block.unit), self._dequantized(block, stage_index)
        drifts = [operand for operand, (_, drift) in sums.items() if drift is not None]
        with layers.replaced({} if drifts else quantized):
            for chunk, following in zip_longest(chunks, chunks[1:]):
                later = (_RESULT, following) if following else None
                with layers.replaced(quantized if drifts else {}):
                    source = (ORIGINAL, chunk) if drifts else later
                    inputs = self._inputs(block, sums.keys(), (_RESULT, chunk), source)
                before = self._inputs(block, drifts, (ORIGINAL, chunk), later) if drifts else {}
                for operand, X in inputs.items():
                    H, drift = sums[operand]
                    with timed(seconds, "hessian"):
                        H.add_(X)
                    if drift is not None:
                        with timed(seconds, "compensate"):
                            drift.add_(before[operand], X)

    def _inputs(
        self, block: BlockInParts, operands: Iterable[Operand], chunk: tuple[str, str], then: tuple[str, str] | None
    ) -> dict[Operand, torch.Tensor]:
        """What operands read of one chunk of a stream, with the weights as they are now; `then` is read meanwhile."""
        runner, index = self._runner, block.unit.index
        hidden = runner.hidden(chunk[0], index, chunk[1], then)
        return inputs_of(runner.layers(block.unit), list(operands), lambda: runner.forward(index, hidden))

    def _operands(self, block: BlockInParts, batch: int) -> list[Operand]:
        """The first operand of each group."""
        by_name = self._runner.layers(block.unit).by_name
        return [by_name[names[0]] for names in block.batches[batch]]

    def _accumulators(self, operand: Operand) -> _Accumulators:
        """Empty sums for a group; the drift's only where errors are compensated.

        Of experts none are: the tokens that reach one are not the same in the source model.
        """
        runner = self._runner
        compensated = runner.spec.quantization.compensates and operand.expert is None
        drift = DriftAccumulator(operand.columns, runner.device) if compensated else None
        return HessianAccumulator(operand.columns, runner.device, operand.expert is not None), drift

    def _save_share(
        self,
        block: BlockInParts,
        batch: int,
        number: int,
        sums: Sequence[_Accumulators],
        seconds: Mapping[str, float],
    ) -> None:
        tensors = {"hessian": stacked([packed(H.partial) for H, _ in sums])}
        drifts = [drift.partial for _, drift in sums if drift is not None]
        tensors |= {"drift": stacked(drifts)} if drifts else {}
        note = {"num_tokens": [H.num_tokens for H, _ in sums], "seconds": seconds}
        block.save(batch, share_part(number), tensors, note)

    def _merged(self, block: BlockInParts, batch: int, seconds: dict[str, float]) -> list[_Accumulators]:
        """A batch's sums over all shares, in their order; the time that those took is added to `seconds`."""
        runner = self._runner
        merged = [self._accumulators(operand) for operand in self._operands(block, batch)]
        for number in range(len(shares(runner.spec.chunks, runner.spec.shares))):
            tensors, note = block.load(batch, share_part(number))
            add_seconds(seconds, note["seconds"])
            for i, (H, drift) in enumerate(merged):
                partial = unpacked(tensors["hessian"][i].to(runner.device), block.columns(batch))
                H.merge_(partial, note["num_tokens"][i])
                if drift is not None:
                    drift.merge_(tensors["drift"][i].to(runner.device), note["num_tokens"][i])
        return merged

    def _statistics(
        self, block: BlockInParts, batch: int, names: Sequence[str], operand: Operand, H: HessianAccumulator
    ) -> InputStatistics:
        """Of a group whose shares are merged, or what takes their place where too few tokens reached an expert."""
        runner, experts = self._runner, self._runner.spec.experts
        if not is_starved(operand, H.num_tokens, experts):
            return InputStatistics(tuple(names), H.finish_("+".join(names)), H.num_tokens, H.num_tokens)
        stage_index = next(i for i, batches in enumerate(block.stages) if batch in batches)
        if experts.policy == "all-tokens":
            layers = runner.layers(runner.load(ORIGINAL, block.unit.index))
            with layers.replaced(self._dequantized(block, stage_index)):
                again = self._gathered(block, stage_index, operand)
                sums = again.sums(operand, runner.device) if isinstance(again, AllTokens) else None
                return starved_statistics(operand, H.num_tokens, experts, sums, runner.device)
        shared = self._gathered(block, stage_index, operand) if experts.policy == "shared-hessian" else None
        sums = shared if isinstance(shared, HessianAccumulator) else None
        return starved_statistics(operand, H.num_tokens, experts, sums, runner.device)

    def _gathered(self, block: BlockInParts, stage_index: int, operand: Operand) -> AllTokens | HessianAccumulator:
        """What the starved experts of a stage share: every token's way through them, or the sums of all experts."""
        if self._instead is None or self._instead[:2] != (block, stage_index):
            self._instead = None  # makes room
            runner = self._runner
            if runner.spec.experts.policy == "all-tokens":
                repeats = runner.repeats(_RESULT, block.unit.index)
                every = AllTokens(runner.layers(block.unit), [operand], repeats)
                self._instead = (block, stage_index, every)
            else:
                gathered = HessianAccumulator(operand.columns, runner.device)
                for other in block.stages[stage_index]:
                    for H, _ in self._merged(block, other, {}):
                        gathered.absorb_(H)
                self._instead = (block, stage_index, gathered)
        return self._instead[2]

    def _dequantized(self, block: BlockInParts, stage_index: int) -> dict[str, torch.Tensor]:
        """Weights of the stages before as they were quantized, in the compute dtype."""
        batches = [batch for before in range(stage_index) for batch in block.stages[before]]
        dtype, device = self._runner.spec.compute_dtype, self._runner.device
        solved = [block.solved(batch)[0] for batch in batches]
        return {name: layer.dequantize().to(device, dtype) for layers in solved for name, layer in layers.items()}


def _save_sum(
    block: BlockInParts,
    batch: int,
    known: Sequence[InputStatistics],
    drift: torch.Tensor | None,
    seconds: Mapping[str, float],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Write the sum of a batch; it and its note."""
    tensors = {"hessian": stacked([own.H for own in known])} | ({"drift": drift} if drift is not None else {})
    written = {**tensors, "hessian": packed(tensors["hessian"])}
    counts = {key: [getattr(own, key) for own in known] for key in ("num_tokens", "routed_tokens", "fallback")}
    note = {**counts, "seconds": seconds}
    block.save(batch, SUM, written, note)
    return tensors, note
