"""The worker: a plain class. An executor decides where it lives and hands it one call at a time.

What a worker hands on is a file in the run directory; what it returns is a small record.
"""

import dataclasses
import math
import platform
import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, assert_never

import torch

from astro.calibration.block_statistics import BlockStatistics
from astro.calibration.starved_experts import InputStatistics
from astro.errors import CheckpointError, NumericalError, RunError
from astro.linalg import compiled
from astro.model.activations import names_of
from astro.model.block_call import load_call, record, returns_tuple, save_calls
from astro.model.perplexity import sequence_losses
from astro.process import configure_process, keep_freed_memory, peak_rss_bytes
from astro.quantization.block import quantize_block
from astro.quantization.grid import QuantizedLinear
from astro.quantization.layer_record import LayerRecord
from astro.storage.atomic import save_tensors
from astro.timing import add_seconds, timed
from astro_dist.planning.units import BlockUnit
from astro_dist.run_directory.layer_widths import layer_schemes
from astro_dist.run_directory.unit_record import (
    BlockResult,
    CopyResult,
    EmbedResult,
    EvaluationResult,
    LossResult,
    UnitRecord,
)
from astro_dist.schedule.calls import (
    AccumulateHessians,
    BlockParts,
    Call,
    CopyTensors,
    Embed,
    EvaluateLoss,
    FinishEvaluation,
    Forward,
    ForwardChunk,
    HeldCall,
    MergeHessians,
    OpenBlock,
    PartCall,
    Result,
    SolveBlock,
    SolveRows,
    SplitBlock,
    TryBetas,
    WriteBlock,
)
from astro_dist.schedule.names import EMBED, ORIGINAL, block_unit, is_held_out, stream_names
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.spec import WorkerSpec
from astro_dist.worker.split_solver import SplitSolver

__all__ = ["Worker"]

_PROBE_TOKENS = 8
_COMPILERS = ("g++", "clang++", "c++")


@dataclasses.dataclass
class _OpenBlock:
    """A block that is being fed, and what was gathered for it."""

    round_index: int
    unit: BlockUnit
    statistics: BlockStatistics
    seconds: dict[str, float]

    @property
    def input_groups(self) -> list[list[str]]:
        """Names of the layers that share an input."""
        return [names_of(group) for group in self.statistics.input_groups]

    def feeding_seconds(self) -> dict[str, float]:
        """Time by phase until all chunks have passed; that of the Hessians apart."""
        hessian_s = self.statistics.seconds
        return {**self.seconds, "forward": self.seconds["forward"] - hessian_s, "hessian": hessian_s}


class Worker:
    """Does units of a run on one device. Holds at most one block."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._device = torch.device(spec.device)
        self._open: _OpenBlock | None = None

    def is_up(self) -> bool:
        """Answers as soon as the worker has a process."""
        return True

    def prepare(self) -> None:
        """Open the source; called once before anything else. Apart from the constructor, so that its errors arrive."""
        configure_process(self._spec.threads)
        keep_freed_memory()
        if self._spec.compiles and not any(map(shutil.which, _COMPILERS)):
            raise RunError(
                f"{platform.node()}: execution.compile wants a C++ compiler, and none of {', '.join(_COMPILERS)} is "
                "there; install g++ on every node, or set execution.compile to false"
            )
        compiled.enable(self._spec.compiles)
        self._runner = BlockRunner(self._spec)
        self._solver = SplitSolver(self._runner)

    def describe(self) -> dict[str, Any]:
        """Where this worker runs and the most memory it ever used."""
        on_gpu = self._device.type == "cuda"
        return {
            "host": platform.node(),
            "device": torch.cuda.get_device_name(self._device) if on_gpu else platform.machine(),
            "torch": torch.__version__,
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_device_bytes": torch.cuda.max_memory_allocated(self._device) if on_gpu else 0,
        }

    @torch.no_grad()
    def do(self, call: Call) -> Result:
        """Do what a schedule asks for.

        Args:
            call: The call; a file of the run holds whatever else it needs.

        Returns:
            What the schedule reads, see `Result`.

        Raises:
            AstroError: The call came to nothing; this worker is not to be used again.
        """
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
            case AccumulateHessians():
                return self._solver.accumulate_hessians(call)
            case MergeHessians() | TryBetas() | SolveRows():
                self.do_part(call)
            case WriteBlock():
                return self.write_block(call)
            case EvaluateLoss():
                return self.evaluate_loss(call)
            case _:
                assert_never(call)
        return None

    def embed(self) -> UnitRecord:
        """Make the hidden states before the first block for every chunk, and what blocks are given besides."""
        spec, runner = self._spec, self._runner
        self._let_go()
        with runner.outside_loaded(with_block=spec.plan.blocks[0]):
            as_tuple = returns_tuple(runner.skeleton, runner.input_ids(spec.chunks[0])[:1, :_PROBE_TOKENS])
            runner.skeleton.blocks[0].to("meta")
            for chunk in spec.chunks:
                input_ids = runner.input_ids(chunk)
                hidden, calls = record(runner.skeleton, input_ids, as_tuple)
                path = spec.run.calls(*input_ids.shape)
                if not path.exists():
                    save_calls(path, calls, as_tuple)
                runner.save_hidden(ORIGINAL, 0, chunk, hidden)
        return spec.run.finish(EMBED, [], EmbedResult(compute_dtype=str(spec.compute_dtype), device=spec.device))

    def copy_tensors(self, call: CopyTensors) -> UnitRecord:
        """Copy tensors from outside the blocks, as they are, to a shard of the result."""
        self._let_go()
        unit = self._spec.plan.copies[call.index]
        path = self._spec.run.model / unit.file
        tensors = self._runner.checkpoint.read(unit.keys)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{self._runner.checkpoint.place(name)}: tensor {name} holds NaN or Inf")
        save_tensors(path, tensors)
        return self._spec.run.finish(unit.name, [path], CopyResult(bytes_read=unit.read_bytes))

    def open_block(self, call: OpenBlock) -> None:
        """Read the block that chunks will pass: the source's, or, in later rounds, that of the round before."""
        start = time.perf_counter()
        runner = self._runner
        self._let_go()
        unit = runner.load(stream_names(self._spec.run.rounds)[call.round_index], call.block)
        statistics = BlockStatistics(runner.layers(unit), self._device)
        seconds = {"read": time.perf_counter() - start, "forward": 0.0}
        self._open = _OpenBlock(call.round_index, unit, statistics, seconds)

    def forward(self, call: Forward) -> None:
        """Pass one chunk through the open block; a calibration chunk adds to the statistics. Keep the output."""
        opened, start, runner = self._opened(call), time.perf_counter(), self._runner
        block, chunk = call.block, call.chunk
        stream = stream_names(self._spec.run.rounds)[call.round_index]
        following = dict(pairwise(self._spec.chunks)).get(chunk)
        hidden = runner.hidden(stream, block, chunk, (stream, following) if following else None)
        if is_held_out(chunk):
            output = runner.forward(block, hidden)
        else:
            output = opened.statistics.run(lambda: runner.forward(block, hidden))
        if block + 1 < len(self._spec.plan.blocks) or is_held_out(chunk):
            runner.save_hidden(stream, block + 1, chunk, output)
        opened.seconds["forward"] += time.perf_counter() - start

    def solve_block(self, call: SolveBlock) -> UnitRecord:
        """Quantize the open block's original weights and write its shard: in the last round a file of the model."""
        opened, spec, runner = self._opened(call), self._spec, self._runner
        unit = opened.unit
        schemes = layer_schemes(spec.run, spec.quantization, unit, call.round_index)
        weights, widths = runner.weights(unit, unit.by_name), runner.widths(call.round_index)
        recipe, known = runner.recipe(unit), self._known(opened)
        quantized, records = quantize_block(weights, opened.input_groups, known, schemes, recipe, widths)
        self._open = None
        finished = self._finish_block(call.round_index, unit, quantized, records, opened.feeding_seconds())
        runner.close()
        return finished

    def split_block(self, call: SplitBlock) -> BlockParts:
        """Hand the open block's Hessians on: workers that have nothing to do help to solve it."""
        opened = self._opened(call)
        known, seconds = self._known(opened), opened.feeding_seconds()
        parts = self._solver.split_block(call.round_index, opened.unit, opened.input_groups, known, seconds)
        self._open = None
        return parts

    def finish_evaluation(self, call: FinishEvaluation) -> UnitRecord:
        """Close the open block of the result, as it was read back from its shard: all held-out chunks have passed."""
        opened = self._opened(call)
        self._open = None
        self._runner.close()
        seconds = {"evaluate": sum(opened.seconds.values())}
        return self._spec.run.finish(call.unit, [], EvaluationResult(seconds=seconds))

    def forward_chunk(self, call: ForwardChunk) -> float:
        """Pass one chunk through a block of a stream; the seconds that it took."""
        start = time.perf_counter()
        self._let_go()
        self._runner.forward_chunk(call.stream, call.block, call.chunk)
        return time.perf_counter() - start

    def do_part(self, call: PartCall) -> None:
        """Do one of the calls by which several workers solve a block."""
        self._open = None
        self._solver.do(call)

    def write_block(self, call: WriteBlock) -> UnitRecord:
        """Put a block's solved tiles together and write its shard."""
        start = time.perf_counter()
        quantized, records, seconds = self._solver.put_together(call)
        seconds["write"] = time.perf_counter() - start
        unit = self._spec.plan.blocks[call.block]
        return self._finish_block(call.round_index, unit, quantized, records, seconds)

    def evaluate_loss(self, call: EvaluateLoss) -> UnitRecord:
        """Measure the negative log-likelihood of the held-out tokens, from the last block's output of a stream."""
        run, runner, last = self._spec.run, self._runner, len(self._spec.plan.blocks)
        self._let_go()
        total, count = 0.0, 0
        with runner.outside_loaded():
            for chunk in runner.held_out:
                hidden, input_ids = runner.hidden(call.stream, last, chunk), runner.input_ids(chunk)
                as_tuple = load_call(run.calls(*input_ids.shape), 0, self._device)[1]
                for loss in sequence_losses(runner.skeleton, input_ids, hidden, as_tuple):
                    total += loss
                    count += input_ids.shape[1] - 1
        if not math.isfinite(total):
            raise NumericalError(
                f"the loss on the held-out text is {total} (stream {call.stream}); a forward pass overflowed"
            )
        return run.finish(call.unit, [], LossResult(negative_log_likelihood=total, tokens=count))

    def _known(self, opened: _OpenBlock) -> Iterator[InputStatistics]:
        """The statistics of every group of an open block that all chunks have passed."""
        stream = stream_names(self._spec.run.rounds)[opened.round_index]
        repeats = self._runner.repeats(stream, opened.unit.index)
        return opened.statistics.finish_(self._spec.experts, repeats)

    def _let_go(self) -> None:
        """Of an open block that the schedule gave up, and of what was helped with: memory is wanted for another."""
        self._open = None
        self._solver.forget()

    def _finish_block(
        self,
        round_index: int,
        unit: BlockUnit,
        quantized: dict[str, QuantizedLinear],
        records: list[LayerRecord],
        seconds: dict[str, float],
    ) -> UnitRecord:
        """Write a quantized block's shard, then its record."""
        for layer in records:
            add_seconds(seconds, layer.seconds)
        with timed(seconds, "write"):
            path = self._runner.write_block(unit, round_index, quantized)
        result = BlockResult(layers=tuple(records), seconds=seconds, **self.describe())
        return self._spec.run.finish(block_unit(round_index, unit.index), [path], result)

    def _opened(self, call: HeldCall) -> _OpenBlock:
        opened = self._open
        if opened is None or (opened.round_index, opened.unit.index) != call.place:
            raise RunError(f"{block_unit(*call.place)} is not open on this worker; it was restarted in between")
        return opened
