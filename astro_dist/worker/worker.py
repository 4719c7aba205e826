"""The worker: a plain class. An executor decides where it lives and calls its methods one at a time.

What a worker hands on is a file in the run directory; what it returns is a small record.
"""

import dataclasses
import math
import platform
import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from astro.calibration.block_statistics import BlockStatistics
from astro.calibration.starved_experts import GroupStatistics
from astro.errors import CheckpointError, NumericalError, RunError
from astro.linalg import compiled
from astro.model.activations import names_of
from astro.model.block_call import load_call, record, returns_tuple, run_head, save_calls
from astro.process import configure_process, keep_freed_memory, peak_rss_bytes
from astro.quantization.block import quantize_block
from astro.quantization.grid import QuantizedLinear
from astro.quantization.layer_record import LayerRecord
from astro.storage.atomic import save_tensors
from astro.timing import add_seconds, timed
from astro_dist.planning.units import BlockUnit
from astro_dist.run_directory.layer_widths import layer_settings
from astro_dist.run_directory.unit_record import (
    BlockResult,
    CopyResult,
    EmbedResult,
    EvaluationResult,
    LossResult,
    UnitRecord,
)
from astro_dist.schedule.names import block_unit, evaluate_unit, head_unit, is_held_out, stream_names
from astro_dist.worker.block_runner import Stage
from astro_dist.worker.spec import WorkerSpec
from astro_dist.worker.split_solver import TileSolver

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
    def groups(self) -> list[list[str]]:
        """Names of the layers that share an input."""
        return [names_of(group) for group in self.statistics.groups]

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
        self._stage = Stage(self._spec)
        self._tiles = TileSolver(self._stage)

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
    def embed(self) -> UnitRecord:
        """Hidden states before the first block for every chunk, and what blocks are given besides."""
        spec, stage = self._spec, self._stage
        self._let_go()
        with stage.outside_loaded(with_block=spec.plan.blocks[0]):
            as_tuple = returns_tuple(stage.skeleton, stage.input_ids(spec.chunks[0])[:1, :_PROBE_TOKENS])
            stage.skeleton.blocks[0].to("meta")
            for chunk in spec.chunks:
                input_ids = stage.input_ids(chunk)
                hidden, calls = record(stage.skeleton, input_ids, as_tuple)
                path = spec.run.calls(*input_ids.shape)
                if not path.exists():
                    save_calls(path, calls, as_tuple)
                stage.hand_on("original", 0, chunk, hidden)
        return spec.run.finish("embed", [], EmbedResult(compute_dtype=str(spec.compute_dtype), device=spec.device))

    def copy(self, index: int) -> UnitRecord:
        """Tensors outside the blocks, as they are, to a shard of the result."""
        self._let_go()
        unit = self._spec.plan.copies[index]
        path = self._spec.run.model / unit.file
        tensors = self._stage.checkpoint.read(unit.keys)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{self._stage.checkpoint.place(name)}: tensor {name} holds NaN or Inf")
        save_tensors(path, tensors)
        return self._spec.run.finish(unit.name, [path], CopyResult(bytes_read=unit.read_bytes))

    def open_block(self, round_index: int, index: int) -> None:
        """Read the block that a pass goes through: the source's, or that of the round before. Behind the last round
        the pass only evaluates.
        """
        start = time.perf_counter()
        stage = self._stage
        self._let_go()
        unit = stage.load(stream_names(self._spec.run.rounds)[round_index], index)
        statistics = BlockStatistics(stage.layers(unit), self._device)
        self._open = _OpenBlock(round_index, unit, statistics, {"read": time.perf_counter() - start, "forward": 0.0})

    @torch.no_grad()
    def forward(self, round_index: int, index: int, chunk: str) -> None:
        """One chunk through the open block; a calibration chunk adds to the statistics. The output is handed on."""
        opened, start, stage = self._opened(round_index, index), time.perf_counter(), self._stage
        stream = stream_names(self._spec.run.rounds)[round_index]
        following = dict(pairwise(self._spec.chunks)).get(chunk)
        hidden = stage.hidden(stream, index, chunk, (stream, following) if following else None)
        if is_held_out(chunk):
            output = stage.forward(index, hidden)
        else:
            output = opened.statistics.run(lambda: stage.forward(index, hidden))
        if index + 1 < len(self._spec.plan.blocks) or is_held_out(chunk):
            stage.hand_on(stream, index + 1, chunk, output)
        opened.seconds["forward"] += time.perf_counter() - start

    @torch.no_grad()
    def solve(self, round_index: int, index: int) -> UnitRecord:
        """Quantize the open block's original weights and write its shard: in the last round a file of the model."""
        opened, spec, stage = self._opened(round_index, index), self._spec, self._stage
        unit = opened.unit
        settings = layer_settings(spec.run, spec.quantization, unit, round_index)
        weights, scale_dtype = stage.weights(unit, unit.by_name), stage.scale_dtype(unit)
        groups, widths, known = opened.groups, stage.widths(round_index), self._known(opened)
        quantized, records = quantize_block(weights, groups, known, settings, spec.regularization, scale_dtype, widths)
        self._open = None
        finished = self._finish_block(round_index, unit, quantized, records, opened.feeding_seconds())
        stage.close()
        return finished

    @torch.no_grad()
    def give_out(self, round_index: int, index: int) -> dict[str, Any]:
        """In place of `solve`, where other workers have nothing to do: they solve it with this one."""
        opened = self._opened(round_index, index)
        known, seconds = self._known(opened), opened.feeding_seconds()
        given_out = self._tiles.give_out(round_index, opened.unit, opened.groups, known, seconds)
        self._open = None
        return given_out

    @torch.no_grad()
    def conclude(self, round_index: int, index: int) -> UnitRecord:
        """All held-out chunks have passed the open block of the result, as it was read back from its shard."""
        opened = self._opened(round_index, index)
        self._open = None
        self._stage.close()
        seconds = {"evaluate": sum(opened.seconds.values())}
        return self._spec.run.finish(evaluate_unit(index), [], EvaluationResult(seconds=seconds))

    @torch.no_grad()
    def pass_on(self, stream: str, index: int, chunk: str) -> float:
        """One chunk through a block of a stream; the seconds it took."""
        start = time.perf_counter()
        self._let_go()
        self._stage.pass_on(stream, index, chunk)
        return time.perf_counter() - start

    @torch.no_grad()
    def share(self, index: int, stage_index: int, number: int) -> dict[str, Any]:
        """Partial sums of one stage of a block's layers from one share of the calibration chunks."""
        return self._tiles.share(index, stage_index, number)

    @torch.no_grad()
    def decide(self, round_index: int, index: int, batch: int) -> None:
        """Decide what holds for all rows of one batch of a block's layer groups, its shares summed."""
        self._open = None
        self._tiles.decide(round_index, index, batch)

    @torch.no_grad()
    def weigh(self, round_index: int, index: int, batch: int, number: int) -> None:
        """Try every strength of the regularization on one tile of the batch's sampled rows."""
        self._open = None
        self._tiles.weigh(round_index, index, batch, number)

    @torch.no_grad()
    def tile(self, round_index: int, index: int, batch: int, number: int) -> None:
        """Solve one tile of the batch's rows."""
        self._open = None
        self._tiles.tile(round_index, index, batch, number)

    @torch.no_grad()
    def write(self, round_index: int, index: int) -> UnitRecord:
        """Put a block's tiles together and write its shard."""
        start = time.perf_counter()
        quantized, records, seconds = self._tiles.merge(round_index, index)
        seconds["write"] = time.perf_counter() - start
        return self._finish_block(round_index, self._spec.plan.blocks[index], quantized, records, seconds)

    @torch.no_grad()
    def head(self, stream: str) -> UnitRecord:
        """Negative log-likelihood of the held-out tokens, from the last block's output of a stream."""
        run, stage, last = self._spec.run, self._stage, len(self._spec.plan.blocks)
        self._let_go()
        total, count = 0.0, 0
        with stage.outside_loaded():
            for chunk in stage.held_out:
                hidden, input_ids = stage.hidden(stream, last, chunk), stage.input_ids(chunk)
                as_tuple = load_call(run.calls(*input_ids.shape), 0, self._device)[1]
                for i in range(len(hidden)):  # one sequence at a time bounds the logits
                    ids = input_ids[i : i + 1]
                    logits = run_head(stage.skeleton, ids, hidden[i : i + 1], as_tuple)[0, :-1].float()
                    total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
                    count += ids.shape[1] - 1
        if not math.isfinite(total):
            raise NumericalError(
                f"the loss on the held-out text is {total} (stream {stream}); a forward pass overflowed"
            )
        return run.finish(head_unit(stream), [], LossResult(negative_log_likelihood=total, tokens=count))

    def _known(self, opened: _OpenBlock) -> Iterator[GroupStatistics]:
        """The statistics of every group of an open block that all chunks have passed."""
        stream = stream_names(self._spec.run.rounds)[opened.round_index]
        repeats = self._stage.repeats(stream, opened.unit.index)
        return opened.statistics.finish_(self._spec.experts, repeats)

    def _let_go(self) -> None:
        """Of an open block that the schedule gave up, and of what was helped with: memory is wanted for another."""
        self._open = None
        self._tiles.forget()

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
            path = self._stage.write_block(unit, round_index, quantized)
        result = BlockResult(layers=tuple(records), seconds=seconds, **self.describe())
        return self._spec.run.finish(block_unit(round_index, unit.index), [path], result)

    def _opened(self, round_index: int, index: int) -> _OpenBlock:
        opened = self._open
        if opened is None or (opened.round_index, opened.unit.index) != (round_index, index):
            raise RunError(f"{block_unit(round_index, index)} is not open on this worker; it was restarted in between")
        return opened
