"""What the calls of a run cost, from headers and configuration alone: operations, bytes, time. Nothing is read.

The layers of a block are solved in batches: input groups of one shape side by side.
"""

from collections.abc import Iterable, Sequence
from typing import assert_never

from astro_dist.planning.correction_cost import correction_size, correction_work
from astro_dist.planning.devices import Device, reads_weights_ahead
from astro_dist.planning.forward_cost import ForwardCost
from astro_dist.planning.planned_run import PlannedRun
from astro_dist.planning.predicted_groups import PredictedInputGroup, block_batches, stages_of
from astro_dist.planning.solve_cost import SolveCost, dequantizing, packing, unpacking
from astro_dist.planning.statistics_cost import StatisticsCost
from astro_dist.planning.tuning_cost import TuningCost
from astro_dist.planning.units import BlockUnit
from astro_dist.planning.work import Work
from astro_dist.planning.worker_memory import WorkerMemory
from astro_dist.schedule.calls import (
    AccumulateHessians,
    Backward,
    BatchCall,
    BatchParts,
    BlockParts,
    Call,
    CopyTensors,
    DifferentiateLoss,
    Embed,
    EvaluateLoss,
    FinishEvaluation,
    Forward,
    ForwardChunk,
    LoadWeights,
    MeasureChannels,
    MergeHessians,
    OpenBlock,
    PartCall,
    Reconstruct,
    Result,
    SmoothChannels,
    SolveBlock,
    SplitBlock,
    TryBetas,
    WeighTokens,
    WriteBlock,
)
from astro_dist.schedule.names import ORIGINAL, is_held_out
from astro_dist.schedule.sequential import shares
from astro_dist.schedule.wave_call import WaveCall, tells_following

__all__ = ["CostModel"]

_CALL_S = 0.005
"""Seconds of a call besides its work: messages, small files, and a forward's operations on nearly nothing. Beside a
block of a large model this is nothing; of a tiny one it is most of the time."""
_TRIED_TOKENS = 32 * 40
"""Tokens that pass a block while it is decided how its inputs are smoothed: 32, in about 40 forwards."""


class CostModel:
    """Tells what the calls of a run cost, and what a worker must hold."""

    def __init__(self, planned: PlannedRun) -> None:
        """Look at a run.

        Args:
            planned: The run.
        """
        plan, config, dtype, device_type = planned.plan, planned.config, planned.dtype, planned.device_type
        self._device_type = device_type
        loops = config.execution.column_loops(device_type)
        self._tile_elements = config.execution.tile_elements(device_type)
        self._reconstruction = config.reconstruction
        self._statistics = StatisticsCost(config, dtype, device_type)
        self._solve = SolveCost(
            config.quantization,
            config.regularizer,
            self._tile_elements,
            loops,
            config.activations.scheme is not None,
            config.quantization.makes_up_for_rounding(config.activations.bits),
        )
        self._batches_of: dict[int, list[PredictedInputGroup]] = {}
        self._plan, self._tokens, self._itemsize = plan, dict(planned.chunk_tokens), dtype.itemsize
        self._shares = shares(list(self._tokens), config.execution.hessian_shares)
        calibrated = sum(not is_held_out(chunk) for chunk in self._tokens)
        self._num_telling = sum(tells_following(passed, calibrated) for passed in range(calibrated))
        self._mode = config.execution.mode
        self._sequence_length = config.calibration.longest_sequence
        self._forward = ForwardCost(plan, self._sequence_length, device_type)
        self._tuning = TuningCost(planned, self._forward)
        self._held_out = sum(n for chunk, n in self._tokens.items() if is_held_out(chunk))
        self._weighs_by_loss = config.calibration.token_weights == "loss"
        self._smooths = config.activations.smoothing != "none"
        self._rounds_cache = config.activations.rounds_cache
        self._memory = WorkerMemory(plan, config, dtype, device_type)

    def seconds(self, call: Call, device: Device) -> float:
        """Return how long a call takes on a device, in seconds.

        Args:
            call: The call.
            device: The device.
        """
        return self.work(call).seconds(device, half=self._itemsize == 2) + _CALL_S

    def work(self, call: Call) -> Work:
        """Count what a call does."""
        plan = self._plan
        match call:
            case Embed():
                return Work(moved_bytes=self._activations(self._tokens) + plan.outside_weights * self._itemsize)
            case EvaluateLoss():
                heads = 1 if call.stream == ORIGINAL else 2  # a result is compared with the original
                return self._forward.head(self._held_out) * heads + Work(
                    moved_bytes=self._activations(self._held_out_chunks)
                )
            case CopyTensors(index):
                return Work(moved_bytes=float(plan.copies[index].read_bytes + plan.copies[index].written_bytes))
            case FinishEvaluation() | WeighTokens():
                return Work()
            case DifferentiateLoss(chunk):
                passed = self._forward.head(self._tokens[chunk]) * 2.0
                return _behind(passed, 2.0 * self._activations([chunk]) + self._ahead_bytes(call))
            case LoadWeights(block=block, was_foretold=was_foretold):
                if was_foretold and reads_weights_ahead(self._device_type):
                    return Work()
                outside = float(plan.outside_weights * self._itemsize)
                return Work(moved_bytes=outside if block is None else plan.blocks[block].read_bytes)
        return self._block_work(call, plan.blocks[call.block])

    def result(self, call: Call) -> Result:
        """Return what a schedule reads from the result of a call."""
        match call:
            case SplitBlock():
                batches = self._batches(self._plan.blocks[call.block])
                widest = sorted(range(len(batches)), key=lambda batch: -batches[batch].columns)
                return BlockParts(tuple(self._parts(batches, index) for index in widest))
            case AccumulateHessians():
                batches = self._batches(self._plan.blocks[call.block])
                stages = stages_of(batches)
                parts = tuple(self._parts(batches, index) for index in (stages[call.stage] if stages else ()))
                return BlockParts(parts, len(stages))
        return None

    def worker_bytes(self) -> int:
        """Return the most that a worker holds, in bytes: of a GPU's memory, or, without one, of the machine's."""
        return self._memory.bytes(max(self._tokens.values()) // self._sequence_length)

    def host_bytes(self) -> int:
        """Return the peak memory in bytes that a worker on a GPU takes of its host, see `WorkerMemory.of_host`."""
        return self._memory.of_host(max(self._tokens.values()) // self._sequence_length)

    def _block_work(
        self,
        call: OpenBlock
        | Forward
        | ForwardChunk
        | MeasureChannels
        | SmoothChannels
        | Backward
        | SolveBlock
        | SplitBlock
        | AccumulateHessians
        | PartCall
        | WriteBlock,
        unit: BlockUnit,
    ) -> Work:
        """Count what a call for a block does."""
        match call:
            case OpenBlock():
                if call.was_foretold and reads_weights_ahead(self._device_type):
                    return Work()
                if call.round_index == 0:
                    return Work(moved_bytes=unit.read_bytes)
                return unpacking(self._weights(unit)) + Work(moved_bytes=unit.written_bytes)
            case Backward():
                passed = self._forward.forth_and_back(self._batches(unit), self._tokens[call.chunk])
                return _behind(passed, 3.0 * self._activations([call.chunk]) + self._ahead_bytes(call))
            case SmoothChannels():
                return self._forward.forth(self._batches(unit), _TRIED_TOKENS) + Work(moved_bytes=2.0 * unit.read_bytes)
            case Forward() | ForwardChunk() | MeasureChannels():
                return self._forward_work(call, unit)
            case SolveBlock():
                return self._whole_solve(call, unit)
            case WriteBlock():
                # Tiles hold a byte a weight. Then all workers read the block back at once, before chunks pass it.
                rewritten = packing(self._weights(unit)) + unpacking(self._weights(unit))
                rewritten += self._tuning.work(self._batches(unit), call.round_index, unit.read_bytes)
                return rewritten + Work(moved_bytes=4.0 * unit.written_bytes)
            case SplitBlock():
                return Work(
                    moved_bytes=sum(self._statistics.square_bytes * batch.square for batch in self._batches(unit))
                )
            case AccumulateHessians():
                return self._share_work(call, unit)
            case BatchCall():
                return self._part_work(call, unit)
        assert_never(call)

    def _whole_solve(self, call: SolveBlock, unit: BlockUnit) -> Work:
        """Count what it takes one worker to solve a block and to write it."""
        batches = self._batches(unit)
        work = packing(self._weights(unit)) + Work(moved_bytes=unit.written_bytes + self._adapter_bytes(unit))
        work = sum((self._solve.whole(batch, call.round_index) for batch in batches), work)
        work = sum((self._correct(batch) for batch in batches), work)
        work += self._tuning.work(batches, call.round_index, unit.read_bytes if call.round_index else 0)
        if self._mode == "stages":
            work = sum((self._calibrated_stage(unit, stage) for stage in range(len(stages_of(batches)))), work)
        if call.following is None or not reads_weights_ahead(self._device_type):
            return work
        return _behind(work, self._plan.blocks[call.following].read_bytes)

    def _forward_work(self, call: Forward | ForwardChunk | MeasureChannels, unit: BlockUnit) -> Work:
        """Count what it takes to pass a chunk through a block, and to add it to the block's statistics."""
        tokens = self._tokens[call.chunk]
        moved = (1.0 + self._writes_output(call)) * self._activations([call.chunk])
        if isinstance(call, ForwardChunk):
            moved += self._ahead_bytes(call)
        passed = _behind(self._forward.forth(self._batches(unit), tokens), moved)
        in_later_round = isinstance(call, Forward) and call.round_index > 0
        if in_later_round or (isinstance(call, ForwardChunk) and call.stream != ORIGINAL):
            passed += self._statistics.rounding(self._batches(unit), tokens)
        counts = isinstance(call, Forward) and not is_held_out(call.chunk) and self._mode != "stages"
        return passed + self._statistics.sums(self._batches(unit), tokens) if counts else passed

    def _ahead_bytes(self, call: WaveCall) -> float:
        """Bytes of the following block that are read behind a call: all calls that tell it share them."""
        if call.following is None or not reads_weights_ahead(self._device_type):
            return 0.0
        return self._plan.blocks[call.following].read_bytes / self._num_telling

    def _share_work(self, call: AccumulateHessians, unit: BlockUnit) -> Work:
        """Count what it takes to sum the Hessians of one stage over one share of the chunks."""
        batches = self._batches(unit)
        stages = stages_of(batches)
        stage = [batches[i] for i in stages[min(call.stage, len(stages) - 1)]] if stages else []
        square = sum(self._statistics.square_bytes * batch.square for batch in stage)
        chunks = self._shares[call.share]
        streams = 1 + self._statistics.is_compensated
        # Layers of the stages before take their new weights from tiles. The block is read for the first stage; which
        # worker has it then already is open.
        earlier = float(sum(batches[i].weights for before in stages[: call.stage] for i in before))
        computed = self._passed_to_stage(unit, call.stage, chunks, streams) + Work(moved_bytes=earlier + square)
        behind = streams * self._activations(chunks)
        if call.stage == 0 and call.block and reads_weights_ahead(self._device_type):
            behind += unit.read_bytes
        elif call.stage == 0:
            computed += Work(moved_bytes=unit.read_bytes)
        return _behind(computed, behind)

    def _calibrated_stage(self, unit: BlockUnit, stage: int) -> Work:
        """Count what it takes to calibrate a stage of a block that one worker solves stage by stage."""
        chunks = [chunk for chunk in self._tokens if not is_held_out(chunk)]
        # The first stage reads what it reads in the source, unless it is behind attention with a rounded cache.
        streams = 1 + (self._statistics.is_compensated and (stage > 0 or self._rounds_cache))
        return _behind(self._passed_to_stage(unit, stage, chunks, streams), self._activations(chunks))

    def _passed_to_stage(self, unit: BlockUnit, stage: int, chunks: Sequence[str], streams: int) -> Work:
        """Count what it takes to pass chunks through a block up to a stage in some streams, and to sum its inputs."""
        batches = self._batches(unit)
        stages = stages_of(batches)
        tokens = sum(self._tokens[chunk] for chunk in chunks)
        before = [batches[i] for earlier in stages[:stage] for i in earlier]
        own = [batches[i] for i in stages[min(stage, len(stages) - 1)]] if stages else []
        sums = self._statistics.sums(own, tokens, drifts=streams > 1) + self._statistics.rounding(
            [*before, *own], tokens
        )
        forwards = self._forward.forth(batches, tokens) * (streams * (stage + 1) / max(len(stages), 1))
        return sums + dequantizing(float(sum(batch.weights for batch in before))) + forwards

    def _part_work(self, call: PartCall, unit: BlockUnit) -> Work:
        """Count what a call does by which several workers solve a block."""
        batches = self._batches(unit)
        batch = batches[min(call.batch, len(batches) - 1)]
        square = self._statistics.square_bytes * batch.square
        weights = batch.weights * self._itemsize
        if isinstance(call, MergeHessians):
            moved = square * (len(self._shares) + 1 if self._mode == "sequential" else 1) + weights
            solved = self._solve.prepare(batch) + self._solve.measure_widths(batch, call.round_index)
            return solved + Work(moved_bytes=moved)
        # Which worker has the batch prepared already is open.
        prepared = self._solve.prepare(batch) + Work(moved_bytes=square + weights)
        if isinstance(call, Reconstruct):
            return prepared + self._correct(batch) + Work(moved_bytes=batch.weights)
        if isinstance(call, TryBetas):
            return prepared + self._solve.try_betas(batch, [_nearest(self._solve.sample_tiles(batch), call.tile)])
        tile = _nearest(self._solve.tiles(batch), call.tile)
        written = 5.0 * batch.count * (tile.stop - tile.start) * batch.columns
        return prepared + self._solve.solve_rows(batch, [tile]) + Work(moved_bytes=written)

    def _correct(self, batch: PredictedInputGroup) -> Work:
        """Count what it takes to correct the errors of a batch's rows."""
        return correction_work(
            batch, self._reconstruction, self._statistics.is_compensated, self._statistics.corrects_rounding
        )

    def _adapter_bytes(self, unit: BlockUnit) -> int:
        """Size of the corrections of a block in a file."""
        return correction_size([unit], self._reconstruction).size_bytes

    def _weights(self, unit: BlockUnit) -> float:
        """Number of a block's quantized weights."""
        return float(sum(batch.weights for batch in self._batches(unit)))

    def _writes_output(self, call: Forward | ForwardChunk | MeasureChannels) -> bool:
        """Whether the output of a chunk is written. The waves before the run's own mode have done so already.

        The last block's output is wanted of held-out chunks only.
        """
        if isinstance(call, ForwardChunk | MeasureChannels) or is_held_out(call.chunk):
            return True
        is_there = (self._weighs_by_loss or self._smooths) and call.round_index == 0
        return not is_there and call.block + 1 < len(self._plan.blocks)

    def _batches(self, unit: BlockUnit) -> list[PredictedInputGroup]:
        if unit.index not in self._batches_of:
            batches = block_batches(unit.linears, self._plan.expert_share, self._tile_elements)
            self._batches_of[unit.index] = batches
        return self._batches_of[unit.index]

    def _parts(self, batches: list[PredictedInputGroup], index: int) -> BatchParts:
        """Count the calls that a batch takes once its Hessians are merged."""
        batch = batches[index]
        is_corrected = self._reconstruction.is_on and batch.reach == 1
        return BatchParts(index, len(self._solve.sample_tiles(batch)), len(self._solve.tiles(batch)), is_corrected)

    @property
    def _held_out_chunks(self) -> list[str]:
        return [chunk for chunk in self._tokens if is_held_out(chunk)]

    def _activations(self, chunks: Iterable[str]) -> float:
        return float(sum(self._tokens[chunk] for chunk in chunks) * self._plan.hidden_size * self._itemsize)


def _behind(work: Work, moved_bytes: float) -> Work:
    """Return work with bytes that are moved while it is computed."""
    return work + Work(moved_bytes=moved_bytes, behind_bytes=moved_bytes)


def _nearest(tiles: list[slice], index: int) -> slice:
    """Return the tile of an index, or the last: overrides may cut a block into more tiles than headers let foresee."""
    return tiles[min(index, len(tiles) - 1)]
