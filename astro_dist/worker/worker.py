"""The worker: a plain class. An executor decides where it lives and hands it one call at a time.

What a worker makes for others is a file in the run directory. What it returns is a small record.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, assert_never

import torch

from astro.calibration.block_statistics import BlockStatistics
from astro.calibration.starved_experts import InputStatistics
from astro.errors import RunError
from astro.process import configure_process, keep_freed_memory
from astro.quantization.block import quantize_block
from astro.quantization.recipe import Recipe
from astro.timing import clock_s, timed
from astro_dist.planning.units import BlockUnit
from astro_dist.run_directory.layer_widths import layer_schemes
from astro_dist.run_directory.unit_record import EvaluationResult, UnitRecord
from astro_dist.schedule.calls import (
    AccumulateHessians,
    Backward,
    BatchCall,
    BlockParts,
    Call,
    CopyTensors,
    DifferentiateLoss,
    Embed,
    EvaluateLoss,
    FinishEvaluation,
    Forward,
    ForwardChunk,
    HeldCall,
    LoadWeights,
    MeasureChannels,
    OpenBlock,
    PartCall,
    Result,
    SmoothChannels,
    SmoothingCall,
    SolveBlock,
    SplitBlock,
    WeighingCall,
    WeighTokens,
    WriteBlock,
)
from astro_dist.schedule.names import stream_names
from astro_dist.worker.block_files import finish_block
from astro_dist.worker.block_passes import feed_chunk, forward_chunk
from astro_dist.worker.block_recipe import measured_widths, sum_kind
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.block_tuner import tune_block
from astro_dist.worker.chunk_pipeline import ChunkPipeline
from astro_dist.worker.compile_check import require_loops
from astro_dist.worker.copied_tensors import copy_tensors
from astro_dist.worker.device_check import require_gpu, within_memory
from astro_dist.worker.embedding import embed_text
from astro_dist.worker.fed_block import FedBlock
from astro_dist.worker.loss_evaluation import evaluate_loss
from astro_dist.worker.machine import describe_machine
from astro_dist.worker.smoother import Smoother
from astro_dist.worker.solved_block import SolvedBlock
from astro_dist.worker.spec import WorkerSpec
from astro_dist.worker.split_solver import SplitSolver
from astro_dist.worker.stage_solver import StageSolver
from astro_dist.worker.token_weigher import TokenWeigher, read_token_weights

__all__ = ["Worker"]


class Worker:
    """Does what a schedule asks for on one device. It holds at most one block."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Begin without the source, see `prepare`.

        Args:
            spec: What the worker is built from.
        """
        self._spec = spec
        self._device = torch.device(spec.device)
        self._fed_block: FedBlock | None = None
        self._last: type[Call] | None = None

    def is_up(self) -> bool:
        """Answer, which shows that the worker has a process."""
        return True

    def prepare(self, warms_up: bool = False) -> None:
        """Open the source. It is called once before anything else; errors of a constructor would not arrive.

        Args:
            warms_up: Whether the loops that a run compiles are compiled now, and not by the first block.

        Raises:
            RunError: The machine has no GPU that torch can use, no compiler or too little memory, or does not see what
                the driver sees.
        """
        within_memory(lambda: self._prepare(warms_up), self._device)

    def _prepare(self, warms_up: bool) -> None:
        spec, device = self._spec, self._device
        configure_process(spec.threads)
        keep_freed_memory()
        if device.type == "cuda":
            require_gpu()
        self._runner = BlockRunner(spec)
        recipe = Recipe(spec.quantization, spec.regularization, torch.bfloat16)
        require_loops(spec.column_loops, recipe, device, warms_up)
        self._solver = SplitSolver(self._runner)
        self._pipeline = ChunkPipeline(self._runner.states, spec.chunks)
        self._weigher = TokenWeigher(self._runner, self._pipeline)
        self._smoother = Smoother(self._runner, self._pipeline)

    def describe(self) -> dict[str, Any]:
        """Return where this worker runs and the most memory that it ever used, as JSON types."""
        return describe_machine(self._device)

    @torch.no_grad()
    def do(self, call: Call) -> Result:
        """Do what a schedule asks for.

        Args:
            call: The call; a file of the run holds whatever else it needs.

        Returns:
            What the schedule reads of the result, see `Result`. Every file of the call is whole by then.

        Raises:
            AstroError: The call failed. The worker is not to be used again.
        """
        return within_memory(lambda: self._do_whole(call), self._device)

    def _do_whole(self, call: Call) -> Result:
        """Do a call, and wait until its files are whole."""
        if type(call) is not self._last:
            self._pipeline.forget()  # what was computed ahead is of no use, and takes memory
            self._last = type(call)
        try:
            result = self._do(call)
            self._runner.states.finish_writing()
        except Exception:
            self._runner.states.give_up_writing()  # a worker that takes its place may be in this very process
            raise
        return result

    def _do(self, call: Call) -> Result:
        match call:
            case Embed():
                return self.embed()
            case CopyTensors():
                return self.copy_tensors(call)
            case OpenBlock():
                self.open_block(call)
            case Forward():
                self.forward(call)
            case SolveBlock():
                return self.solve_block(call)
            case SplitBlock():
                return self.split_block(call)
            case FinishEvaluation():
                return self.finish_evaluation(call)
            case ForwardChunk():
                return self.forward_chunk(call)
            case AccumulateHessians() | BatchCall():
                return self.do_part(call)
            case WriteBlock():
                return self.write_block(call)
            case EvaluateLoss():
                return self.evaluate_loss(call)
            case _:
                return self._do_first(call)
        return None

    def _do_first(self, call: WeighingCall | SmoothingCall) -> Result:
        """Do what comes before a run's own mode."""
        match call:
            case LoadWeights() | DifferentiateLoss() | Backward() | WeighTokens():
                return self.weigh_tokens(call)
            case MeasureChannels() | SmoothChannels():
                return self.smooth(call)
            case _:
                assert_never(call)

    def weigh_tokens(self, call: WeighingCall) -> UnitRecord | None:
        """Do one of the calls that measure token weights; a record comes of the last one of a block."""
        self._release()
        return self._weigher.do(call)

    def smooth(self, call: SmoothingCall) -> UnitRecord | None:
        """Do one of the calls that smooth the inputs of a block; a record comes of the last one of a block."""
        self._release()
        return self._smoother.do(call)

    def embed(self) -> UnitRecord:
        """Make every chunk's hidden states before the first block, and record what else blocks are called with."""
        self._release()
        return embed_text(self._runner)

    def copy_tensors(self, call: CopyTensors) -> UnitRecord:
        """Copy tensors from outside the blocks, as they are, to a shard of the result.

        Raises:
            CheckpointError: A tensor holds NaN or Inf.
        """
        self._release()
        return copy_tensors(self._runner.spec, self._spec.plan.copies[call.index])

    def open_block(self, call: OpenBlock) -> None:
        """Load the block that chunks will pass: the source's, or, in later rounds, that of the round before."""
        runner, seconds = self._runner, {"forward": 0.0}
        with timed(seconds, "read", self._device):
            self._release()
            stream = stream_names(self._spec.run.rounds)[call.round_index]
            unit = runner.load(stream, call.block)
            statistics = None if self._spec.mode == "stages" else self._empty_statistics(unit, stream)
        self._fed_block = FedBlock(call.round_index, unit, statistics, seconds)

    def forward(self, call: Forward) -> None:
        """Pass one chunk through the open block and keep the output; a calibration chunk adds to the statistics."""
        feed_chunk(self._runner, self._pipeline, self._require_fed_block(call), call)

    def solve_block(self, call: SolveBlock) -> UnitRecord:
        """Quantize the open block's original weights and write its shard: in the last round a file of the model."""
        fed_block, runner = self._require_fed_block(call), self._runner
        unit = fed_block.unit
        if call.following is not None:
            runner.expect_block(call.following)
        staged = self._spec.mode == "stages"
        solved = StageSolver(runner, fed_block).solve() if staged else self._solve_at_once(fed_block)
        self._fed_block = None
        solved = tune_block(runner, call.round_index, unit, solved)
        finished = finish_block(runner, call.round_index, unit, solved)
        runner.close()
        return finished

    def _solve_at_once(self, fed_block: FedBlock) -> SolvedBlock:
        """Quantize all layers of a block, none of which waits for another."""
        spec, runner, unit, round_index = self._spec, self._runner, fed_block.unit, fed_block.round_index
        schemes = layer_schemes(spec.run, spec.quantization, unit, round_index)
        weights, widths = runner.weights(unit, unit.by_name), measured_widths(spec, round_index)
        statistics, recipe = self._input_statistics(fed_block), runner.recipe(unit)
        quantized, records = quantize_block(weights, fed_block.input_groups, statistics, schemes, recipe, widths)
        return SolvedBlock(quantized, records, fed_block.feeding_seconds(), fed_block.largest.scales)

    def split_block(self, call: SplitBlock) -> BlockParts:
        """Write the open block's Hessians, so that workers that have nothing to do help to solve it."""
        fed_block = self._require_fed_block(call)
        parts = self._solver.split_block(fed_block, self._input_statistics(fed_block))
        self._fed_block = None
        return parts

    def finish_evaluation(self, call: FinishEvaluation) -> UnitRecord:
        """Close a block of the result that was read back from its shard, once all held-out chunks have passed it."""
        fed_block = self._require_fed_block(call)
        self._fed_block = None
        self._runner.close()
        seconds = {"evaluate": sum(fed_block.seconds.values())}
        return self._spec.run.finish(call.unit, [], EvaluationResult(seconds=seconds))

    def forward_chunk(self, call: ForwardChunk) -> float:
        """Pass one chunk through a block of a stream, and return the seconds that it took."""
        self._release()
        return forward_chunk(self._runner, self._pipeline, call)

    def do_part(self, call: AccumulateHessians | PartCall) -> BlockParts | None:
        """Do one of the calls by which several workers solve a block."""
        self._fed_block = None
        return self._solver.do(call)

    def write_block(self, call: WriteBlock) -> UnitRecord:
        """Put a block's solved tiles together and write its shard."""
        start = clock_s(self._device)
        solved = self._solver.put_together(call)
        read_s = clock_s(self._device) - start
        unit = self._spec.plan.blocks[call.block]
        solved = tune_block(self._runner, call.round_index, unit, solved)
        return finish_block(self._runner, call.round_index, unit, solved, read_s)

    def evaluate_loss(self, call: EvaluateLoss) -> UnitRecord:
        """Measure what a stream's model predicts of the held-out text."""
        self._release()
        return evaluate_loss(self._runner, call)

    def _input_statistics(self, fed_block: FedBlock) -> Iterator[InputStatistics]:
        """The statistics of every input group of the open block, which all chunks have passed."""
        assert fed_block.statistics is not None
        stream = stream_names(self._spec.run.rounds)[fed_block.round_index]
        repeats = self._runner.repeats(stream, fed_block.unit.index)
        return fed_block.statistics.finish_(self._spec.experts, repeats)

    def _empty_statistics(self, unit: BlockUnit, stream: str) -> BlockStatistics:
        """Statistics of a block that is loaded, to which chunks of a stream will add."""
        runner = self._runner
        weights, kind = read_token_weights(runner, unit), partial(sum_kind, runner.spec)
        return BlockStatistics(runner.layers(unit), self._device, weights, kind, runner.served(stream))

    def _release(self) -> None:
        """Let go of an open block that the schedule gave up, and of what was helped with, to make room for another."""
        self._fed_block = None
        self._solver.forget()

    def _require_fed_block(self, call: HeldCall) -> FedBlock:
        fed_block = self._fed_block
        if fed_block is None or fed_block.place != call.place:
            raise RunError(f"block {call.block + 1} is not open on this worker; it was restarted in between")
        return fed_block
