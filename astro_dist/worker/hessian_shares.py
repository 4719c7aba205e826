"""The statistics of a block that several workers solve: shares of the calibration chunks, and what they add up to.

In mode `sequential` the input groups of a block come in stages that follow its forward: the inputs of a stage already
hold the errors of the stages before. A share is a fixed part of the chunks. Shares are added up in their order.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any

import torch

from astro.calibration.block_statistics import inputs_of
from astro.calibration.drift import DriftAccumulator
from astro.calibration.input_sums import InputSums, RoundingMoments, SumKind, side_by_side
from astro.calibration.starved_experts import (
    AllTokens,
    InputStatistics,
    exhaust,
    is_starved,
    starved_statistics,
    sufficient_statistics,
)
from astro.calibration.token_weights import TokenWeights
from astro.linalg.batching import stacked, stacked_padded
from astro.linalg.symmetric import packed, unpacked
from astro.model.activations import Inputs, Operand
from astro.model.cache_scales import LargestByModule
from astro.model.low_rank import LowRank, attached
from astro.quantization.block import COUNTED
from astro.timing import Stopwatch, add_seconds, clock_s
from astro_dist.schedule.names import ORIGINAL, SUM, round_stream, share_part
from astro_dist.schedule.sequential import shares
from astro_dist.worker.block_recipe import sum_kind
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.split_block import BlockInParts
from astro_dist.worker.token_weigher import read_token_weights

__all__ = ["BatchStatistics", "HessianShares"]

_RESULT = round_stream(0)
"""The stream through what the only round of mode `sequential` writes."""
_ROUNDING, _CORRECTION = "rounding_drift", "correction_drift"
"""Names of the drifts from rounding in a file, as sums have them too: for weights, and for corrections."""


@dataclasses.dataclass(frozen=True)
class BatchStatistics:
    """What calibration learned of the inputs of a batch, over all chunks.

    Attributes:
        H: Weighted mean of x̂x̂ᵀ of each input group, float32 [B, C, C].
        drift: Weighted mean of (x_s − x)x̂ᵀ of each input group, float32 [B, C, C]; None where errors are not
            compensated.
        spread: How far the drifts of the even and the odd shares lie apart, float32 [B, C, C] in the memory of the
            machine, see `DriftAccumulator.spread_`; None where it was not just measured.
        fallbacks: Policy that was used for each input group because too few tokens reached it; empty elsewhere.
        rounding: What was learned of how the inputs are rounded; None where they stay as they are.
    """

    H: torch.Tensor
    drift: torch.Tensor | None
    spread: torch.Tensor | None
    fallbacks: tuple[str, ...]
    rounding: RoundingMoments | None


@dataclasses.dataclass(frozen=True)
class _Substitute:
    """What the starved experts of a stage share: every token's way through them, or the sums of all experts."""

    block: BlockInParts
    stage: int
    source: AllTokens | InputSums


@dataclasses.dataclass(frozen=True)
class _SolvedLayers:
    """Layers as they were quantized: their weights, and the corrections that some of them have."""

    weights: Mapping[str, torch.Tensor]
    corrections: Mapping[str, LowRank]


class HessianShares:
    """Makes the shares of a block's Hessians, and adds them up."""

    def __init__(self, runner: BlockRunner) -> None:
        """Begin with nothing.

        Args:
            runner: Runner of the worker's blocks.
        """
        self._runner = runner
        self.forget()

    def forget(self) -> None:
        """Let go of what was gathered for starved experts, and of the tokens' weights."""
        self._substitute: _Substitute | None = None
        self._weights: tuple[BlockInParts, TokenWeights] | None = None

    def accumulate(self, block: BlockInParts, stage: int, share: int, start: float) -> None:
        """Sum the Hessians of a stage's batches over one share of the calibration chunks, and write the sums.

        Args:
            block: The block, laid out and loaded.
            stage: Index of the stage.
            share: Index of the share.
            start: Time at which the work on the share began, as `clock_s` has it.
        """
        runner = self._runner
        batches = block.stages[stage] if block.stages else []
        sums = {batch: [self._empty(operand) for operand in self._operands(block, batch)] for batch in batches}
        by_operand = {
            operand: of_operand
            for batch in batches
            for operand, of_operand in zip(self._operands(block, batch), sums[batch], strict=True)
        }
        watches = {phase: Stopwatch(runner.device) for phase in ("hessian", "compensate")}
        chunks = shares(runner.spec.chunks, runner.spec.shares)[share]
        largest = self._feed(block, stage, chunks, by_operand, watches)
        total_s, seconds = clock_s(runner.device) - start, {phase: watch.read_s() for phase, watch in watches.items()}
        seconds["forward"] = total_s - sum(seconds.values())
        by_operand.clear()
        for batch in batches:
            self._save_share(block, batch, share, sums.pop(batch), seconds if batch == batches[0] else {}, largest)

    def save_sums(
        self,
        block: BlockInParts,
        statistics: Iterable[InputStatistics],
        seconds: Mapping[str, float],
        largest: LargestByModule,
    ) -> None:
        """Write the sums of all batches of a block that this worker fed.

        Args:
            block: The block, all of its input groups in one stage.
            statistics: Statistics of every input group in order, which are finished here.
            seconds: Time by phase that was spent on the block so far.
            largest: Largest keys and values.
        """
        remaining = iter(statistics)
        for batch, input_groups in enumerate(block.batches):
            finished = [next(remaining) for _ in input_groups]
            _save_sum(block, batch, finished, {} if batch else seconds, largest)
            finished.clear()
        exhaust(remaining)

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
            return self.read(block, batch)
        seconds: dict[str, float] = {}
        finished: list[InputStatistics] = []
        spreads: list[torch.Tensor] = []
        merged, operands = self._merged(block, batch, seconds), self._operands(block, batch)
        for names, operand in zip(block.batches[batch], operands, strict=True):
            sums, even = merged.pop(0)
            if sums.drift is not None and even is not None:
                # It is needed once, after the Hessian is factored, which takes the device's memory.
                spreads.append(sums.drift.spread_(even).cpu())
            del even
            statistics = self._statistics(block, batch, names, operand, sums)
            del sums
            energy = self._token_weights(block).energy_of(operand)
            finished.append(dataclasses.replace(statistics, gradient_energy=energy))
        written = _save_sum(block, batch, finished, seconds, self._largest(block, batch))
        return dataclasses.replace(written, spread=stacked(spreads)) if spreads else written

    def read(self, block: BlockInParts, batch: int) -> BatchStatistics:
        """Read the statistics of a batch, as they were written.

        Args:
            block: The block.
            batch: Index of the batch.

        Raises:
            DamagedError: The part is missing, or not as it was written.
        """
        tensors, note = block.load(batch, SUM)
        H = unpacked(tensors["hessian"].to(self._runner.device), block.columns(batch))
        sample = tensors.get("sample")
        drifts = tensors.get(_ROUNDING), tensors.get(_CORRECTION)
        rounding = None if sample is None else RoundingMoments(sample, *drifts)
        return BatchStatistics(H, tensors.get("drift"), None, tuple(note["fallback"]), rounding)

    def _token_weights(self, block: BlockInParts) -> TokenWeights:
        """The weights of the calibration tokens at a block's layers, read once."""
        if self._weights is None or self._weights[0] is not block:
            self._weights = (block, read_token_weights(self._runner, block.unit))
        return self._weights[1]

    def _feed(
        self,
        block: BlockInParts,
        stage: int,
        chunks: Sequence[str],
        sums: Mapping[Operand, InputSums],
        watches: Mapping[str, Stopwatch],
    ) -> LargestByModule:
        """Pass chunks through the block up to a stage, those of the source too where the drift from it is wanted.

        Returns:
            The largest keys and values; of no module but in the first stage.
        """
        largest = LargestByModule()
        earlier, nothing = self._earlier_stages(block, stage), _SolvedLayers({}, {})
        weights = self._token_weights(block)
        drifts = [operand for operand, of_operand in sums.items() if of_operand.drift is not None]
        with self._put_in(block, nothing if drifts else earlier):
            for chunk, following in zip_longest(chunks, chunks[1:]):
                later = (_RESULT, following) if following else None
                with self._put_in(block, earlier if drifts else nothing):
                    source = (ORIGINAL, chunk) if drifts else later
                    inputs = self._inputs(block, sums.keys(), (_RESULT, chunk), source, largest if stage == 0 else None)
                source_inputs = self._inputs(block, drifts, (ORIGINAL, chunk), later) if drifts else {}
                for operand, of_operand in inputs.items():
                    with watches["hessian"].running():
                        of_tokens = weights.of(operand, chunk, of_operand)
                        rounded = sums[operand].add_(of_operand.X, of_tokens)
                    drift = sums[operand].drift
                    if drift is not None:
                        with watches["compensate"].running():
                            drift.add_(source_inputs[operand].X, of_operand.X, of_tokens, rounded)
        return largest

    def _inputs(
        self,
        block: BlockInParts,
        operands: Iterable[Operand],
        chunk: tuple[str, str],
        then: tuple[str, str] | None,
        largest: LargestByModule | None = None,
    ) -> dict[Operand, Inputs]:
        """What operands read of one chunk of a stream, with the weights as they are now; `then` is read meanwhile.

        In the first stage `largest` grows by the keys and values of the chunk. The weights that make them are not
        quantized yet. Where all of these stay in 16 bits, the stage's own inputs are behind attention, and the chunk
        alone says how its keys and values round.
        """
        runner, index = self._runner, block.unit.index
        state = runner.states.read(chunk[0], index, chunk[1], then)
        layers, cache = runner.layers(block.unit), runner.cache
        with ExitStack() as stack:
            stack.enter_context(runner.rounding(chunk[0], block.unit, is_whole=False))
            is_enough = None
            if largest is not None:
                is_enough = stack.enter_context(cache.watching(index, largest, rounds=True))
            elif chunk[0] == _RESULT:
                stack.enter_context(cache.rounding(block.cache_scales))
            return inputs_of(layers, list(operands), lambda: runner.forward(index, state, chunk[1]), is_enough)

    def _largest(self, block: BlockInParts, batch: int) -> LargestByModule:
        """The largest keys and values in all shares, if the batch is in the first stage and servers round them."""
        largest, spec = LargestByModule(), self._runner.spec
        for share in range(len(shares(spec.chunks, spec.shares)) if spec.activations.rounds_cache else 0):
            largest.absorb_(block.largest(batch, share_part(share)))
        return largest

    def _operands(self, block: BlockInParts, batch: int) -> list[Operand]:
        """The first operand of each input group."""
        by_name = self._runner.layers(block.unit).by_name
        return [by_name[names[0]] for names in block.batches[batch]]

    def _sum_kind(self, operand: Operand) -> SumKind:
        """What is summed of an input group."""
        return sum_kind(self._runner.spec, operand, has_drift=self._runner.spec.quantization.compensates)

    def _empty(self, operand: Operand) -> InputSums:
        """Empty sums for an input group."""
        is_expert = operand.expert is not None
        return InputSums(operand.columns, self._runner.device, self._sum_kind(operand), keep_inputs=is_expert)

    def _save_share(
        self,
        block: BlockInParts,
        batch: int,
        share: int,
        sums: Sequence[InputSums],
        seconds: Mapping[str, float],
        largest: LargestByModule,
    ) -> None:
        tensors = {"hessian": stacked([packed(each.hessian.partial) for each in sums])}
        for name, drifts in (
            ("drift", [each.drift for each in sums]),
            (_ROUNDING, [each.rounding_drift for each in sums]),
            (_CORRECTION, [each.correction_drift for each in sums]),
        ):
            partial = [drift.partial for drift in drifts if drift is not None]
            tensors |= {name: stacked(partial)} if partial else {}
        note = {
            "num_tokens": [each.num_tokens for each in sums],
            "totals": [each.hessian.totals.tolist() for each in sums],
            "seconds": seconds,
            "largest": largest.to_json(),
        }
        samples = [each.sample for each in sums if each.sample is not None]
        rows = stacked_padded([sample.rows for sample in samples], 2 * block.columns(batch))
        if rows is not None:
            tensors["sample"] = rows
            note["sampled"] = [len(sample.rows) for sample in samples]
            note["sampled_weights"] = [float(sample.total_weight) for sample in samples]
        block.save(batch, share_part(share), tensors, note)

    def _merged(
        self, block: BlockInParts, batch: int, seconds: dict[str, float]
    ) -> list[tuple[InputSums, DriftAccumulator | None]]:
        """A batch's sums over all shares, in their order; the time that those took is added to `seconds`.

        The last one of each is the drift over the even shares alone, where the share to make up for is measured.
        """
        runner = self._runner
        count = len(shares(runner.spec.chunks, runner.spec.shares))
        halves = runner.spec.quantization.compensation == "auto" and count > 1
        merged: list[tuple[InputSums, DriftAccumulator | None]] = []
        for operand in self._operands(block, batch):
            sums = self._empty(operand)
            is_halved = halves and sums.drift is not None
            merged.append((sums, DriftAccumulator(operand.columns, runner.device) if is_halved else None))
        for share in range(count):
            tensors, note = block.load(batch, share_part(share))
            add_seconds(seconds, note["seconds"])
            for i, (sums, even) in enumerate(merged):
                totals = note["totals"][i]
                sums.hessian.merge_(
                    unpacked(tensors["hessian"][i].to(runner.device), block.columns(batch)),
                    note["num_tokens"][i],
                    totals,
                )
                if sums.sample is not None:
                    rows = tensors["sample"][i, : note["sampled"][i]].to(runner.device)
                    sums.sample.merge_(rows, note["sampled_weights"][i])
                for of_rounding, name in ((sums.rounding_drift, _ROUNDING), (sums.correction_drift, _CORRECTION)):
                    if of_rounding is not None:
                        of_rounding.merge_(tensors[name][i].to(runner.device), totals[0])
                if sums.drift is not None:
                    of_share = tensors["drift"][i].to(runner.device)
                    sums.drift.merge_(of_share, totals[0])
                    if even is not None and share % 2 == 0:
                        even.merge_(of_share, totals[0])
                    del of_share  # before the next one is there
        return merged

    def _statistics(
        self, block: BlockInParts, batch: int, names: Sequence[str], operand: Operand, sums: InputSums
    ) -> InputStatistics:
        """Finish an input group whose shares are merged, or replace its sums if too few tokens reached an expert."""
        runner, experts, kind = self._runner, self._runner.spec.experts, self._runner.spec.token_weights
        if not is_starved(operand, sums.num_tokens, experts):
            return sufficient_statistics(names, sums, self._token_weights(block).kind_of(operand))
        stage = block.stage_of(batch)
        instead: InputSums | None = None
        if experts.policy == "all-tokens":
            runner.load(ORIGINAL, block.unit.index)
            with self._put_in(block, self._earlier_stages(block, stage)):
                all_tokens = self._gathered(block, batch, operand)
                if isinstance(all_tokens, AllTokens):
                    instead = all_tokens.sums(operand, runner.device)
        elif experts.policy == "shared-hessian":
            shared = self._gathered(block, batch, operand)
            instead = shared if isinstance(shared, InputSums) else None
        return starved_statistics(operand, sums.num_tokens, experts, instead, runner.device, kind)

    def _gathered(self, block: BlockInParts, batch: int, operand: Operand) -> AllTokens | InputSums:
        """What replaces the sums of the starved experts of a batch's stage; it is gathered for the first of them."""
        stage, substitute = block.stage_of(batch), self._substitute
        if substitute is None or (substitute.block, substitute.stage) != (block, stage):
            self._substitute = substitute = None  # makes room
            runner = self._runner
            source: AllTokens | InputSums
            if runner.spec.experts.policy == "all-tokens":
                scales = block.cache_scales if stage else self._largest(block, batch).scales
                repeats = runner.repeats(_RESULT, block.unit.index, scales)
                kind, served = runner.spec.token_weights, runner.served(_RESULT)
                source = AllTokens(runner.layers(block.unit), [operand], repeats, kind, self._sum_kind, served)
            else:
                source = InputSums(operand.columns, runner.device, self._sum_kind(operand))
                for batch in block.stages[stage]:
                    for sums, _ in self._merged(block, batch, {}):
                        source.absorb_(sums)
            self._substitute = substitute = _Substitute(block, stage, source)
        return substitute.source

    def _earlier_stages(self, block: BlockInParts, stage: int) -> "_SolvedLayers":
        """Layers of the stages before as they were quantized, in the compute dtype."""
        batches = [batch for earlier in block.stages[:stage] for batch in earlier]
        dtype, device = self._runner.spec.compute_dtype, self._runner.device
        weights: dict[str, torch.Tensor] = {}
        corrections: dict[str, LowRank] = {}
        for batch in batches:
            for name, solved in block.solved(batch)[0].items():
                layer = solved.to(device)
                weights[name] = layer.dequantize(dtype)
                corrections |= {name: layer.correction} if layer.correction else {}
        return _SolvedLayers(weights, corrections)

    @contextmanager
    def _put_in(self, block: BlockInParts, solved: "_SolvedLayers") -> Iterator[None]:
        """Let a block compute with layers as they were solved while the body of a `with` statement runs."""
        runner = self._runner
        layers, model = runner.layers(block.unit), runner.skeleton.model
        with layers.replaced(solved.weights), attached(model, solved.corrections, runner.spec.compute_dtype):
            yield


def _save_sum(
    block: BlockInParts,
    batch: int,
    statistics: Sequence[InputStatistics],
    seconds: Mapping[str, float],
    largest: LargestByModule,
) -> BatchStatistics:
    """Write the statistics of a batch's input groups, and return them side by side."""
    H, columns = stacked([inputs.H for inputs in statistics]), block.columns(batch)
    drift = stacked_padded([inputs.drift for inputs in statistics], columns)
    rounding = side_by_side([inputs.rounding for inputs in statistics], columns)
    tensors = {"hessian": packed(H)} | ({"drift": drift} if drift is not None else {})
    if rounding is not None:
        drifts = {_ROUNDING: rounding.drift, _CORRECTION: rounding.correction_drift}
        tensors |= {"sample": rounding.sample} | {name: each for name, each in drifts.items() if each is not None}
    note: dict[str, Any] = {
        "num_tokens": [inputs.num_tokens for inputs in statistics],
        **{figure: [getattr(inputs, figure) for inputs in statistics] for figure in COUNTED},
        "seconds": seconds,
        "largest": largest.to_json(),
    }
    block.save(batch, SUM, tensors, note)
    return BatchStatistics(H, drift, None, tuple(note["fallback"]), rounding)
