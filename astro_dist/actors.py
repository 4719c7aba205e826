"""The worker: a plain class. An executor decides where it lives and calls its methods one at a time.

What a worker hands on is a file in the run directory; what it returns is a small record.
"""

import ctypes
import dataclasses
import math
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from astro.block import BlockStatistics, forward, quantize_block
from astro.checkpoint import Checkpoint, load_tensors, save_tensors
from astro.config import Quantization, Regularizer
from astro.errors import CheckpointError, NumericalError, RunError
from astro.formats import compressed_tensors
from astro.recording import BlockCall, load_call, record, returns_tuple, run_head, save_calls
from astro.skeleton import Skeleton
from astro_dist.manifest import RunDirectory
from astro_dist.plan import BlockUnit, Plan
from astro_dist.schedule import is_held_out

__all__ = ["Worker", "WorkerSpec", "configure_process", "peak_rss_bytes"]

_PROBE_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker is built from, and rebuilt from after a failure.

    Attributes:
        source: folder of the source checkpoint.
        fingerprint: of the source checkpoint.
        trust_remote_code: whether code of the checkpoint may run.
        run: the run directory.
        plan: every unit.
        chunks: chunk names in the order in which they travel.
        quantization: grid and solver.
        regularization: what is done to the weights before.
        compute_dtype: of forwards and activations.
        device: "cpu" or "cuda".
        threads: CPU threads.
    """

    source: Path
    fingerprint: str
    trust_remote_code: bool
    run: RunDirectory
    plan: Plan
    chunks: tuple[str, ...]
    quantization: Quantization
    regularization: Regularizer
    compute_dtype: torch.dtype
    device: str
    threads: int


def configure_process(threads: int) -> None:
    """Settings of the whole process that the arithmetic depends on: threads, and exact float32 products."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def peak_rss_bytes() -> int:
    """Largest resident memory this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _return_freed_memory() -> None:
    """Give the C library's free memory back to the system; a worker lives for hours and would keep its largest ever."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


@dataclasses.dataclass
class _OpenBlock:
    """A block with its weights on the device and what was gathered for it."""

    unit: BlockUnit
    statistics: BlockStatistics
    calls: dict[tuple[int, int], BlockCall]
    seconds: dict[str, float]


class Worker:
    """Does units of a run on one device. Holds at most one block."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._device = torch.device(spec.device)
        self._tokens: dict[str, torch.Tensor] | None = None
        self._open: _OpenBlock | None = None

    def prepare(self) -> None:
        """Open the source; called once before anything else. Apart from the constructor, so that its errors arrive.

        Raises:
            RunError: this machine does not see the run directory, or sees another source than the driver.
        """
        spec = self._spec
        configure_process(spec.threads)
        if not spec.run.tokens.is_file():
            raise RunError(
                f"{platform.node()}: does not see {spec.run.root}; output.dir must be a folder all nodes see"
            )
        self._checkpoint = Checkpoint.open(spec.source)
        if self._checkpoint.fingerprint() != spec.fingerprint:
            raise RunError(
                f"{platform.node()}: {spec.source} is not the checkpoint that the driver sees under this path"
            )
        self._skeleton = Skeleton(spec.source, spec.compute_dtype, spec.trust_remote_code)

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
    def embed(self) -> dict[str, Any]:
        """Hidden states of the first block for every chunk, and what blocks are given besides."""
        run, skeleton = self._spec.run, self._skeleton
        with self._outside_loaded(with_block=self._spec.plan.blocks[0]):
            as_tuple = returns_tuple(skeleton, self._input_ids(self._spec.chunks[0])[:1, :_PROBE_TOKENS])
        with self._outside_loaded():
            for chunk in self._spec.chunks:
                input_ids = self._input_ids(chunk)
                hidden, calls = record(skeleton, input_ids, as_tuple)
                path = run.calls(*input_ids.shape)
                if not path.exists():
                    save_calls(path, calls, as_tuple)
                self._hand_on("original", 0, chunk, hidden)
                if is_held_out(chunk):
                    self._hand_on("quantized", 0, chunk, hidden)
        return run.finish("embed", [], {"compute_dtype": str(self._spec.compute_dtype)})

    def copy(self, index: int) -> dict[str, Any]:
        """Tensors outside the blocks, as they are, to a shard of the result."""
        unit = self._spec.plan.copies[index]
        path = self._spec.run.model / unit.file
        save_tensors(path, self._checkpoint.read(unit.keys))
        return self._spec.run.finish(unit.name, [path], {"bytes_read": unit.read_bytes})

    def open_block(self, index: int) -> None:
        """Read a block's weights onto the device."""
        start = time.perf_counter()
        self._close_block()
        unit = self._spec.plan.blocks[index]
        self._skeleton.load(self._skeleton.blocks[index], self._checkpoint.read(unit.keys), self._device)
        self._skeleton.require_filled(self._skeleton.blocks[index], unit.name)
        self._require_finite(unit)
        statistics = BlockStatistics(self._linear_modules(unit), self._device)
        self._open = _OpenBlock(unit, statistics, {}, {"read": time.perf_counter() - start, "forward": 0.0})

    @torch.no_grad()
    def forward(self, index: int, chunk: str) -> None:
        """One chunk through the open block; a calibration chunk adds to the statistics. The output is handed on."""
        opened, start = self._opened(index), time.perf_counter()
        hidden = self._hidden("original", index, chunk)
        call = self._call(index, hidden, opened.calls)
        block = self._skeleton.blocks[index]
        if is_held_out(chunk):
            output = forward(block, hidden, call)
        else:
            output = opened.statistics.run(lambda: forward(block, hidden, call))
        if index + 1 < len(self._spec.plan.blocks) or is_held_out(chunk):
            self._hand_on("original", index + 1, chunk, output)
        opened.seconds["forward"] += time.perf_counter() - start

    @torch.no_grad()
    def solve(self, index: int) -> dict[str, Any]:
        """Quantize the open block and write its shard, a final file of the model."""
        opened, spec = self._opened(index), self._spec
        start = time.perf_counter()
        scale_dtype = self._stored_dtype(opened.unit)
        quantized, records = quantize_block(
            self._weights(opened.unit, scale_dtype),
            opened.statistics.finish_(),
            spec.quantization,
            spec.regularization,
            scale_dtype,
        )
        solved = time.perf_counter()
        tensors: dict[str, torch.Tensor] = {}
        for linear in opened.unit.linears:
            tensors |= compressed_tensors.pack_linear(linear.stem, quantized.pop(linear.name), scale_dtype)
        replaced = {linear.key for linear in opened.unit.linears}
        tensors |= self._checkpoint.read(key for key in opened.unit.keys if key not in replaced)
        path = spec.run.model / opened.unit.file
        save_tensors(path, tensors)
        hessian_s = opened.statistics.seconds
        seconds = {
            **opened.seconds,
            "forward": opened.seconds["forward"] - hessian_s,
            "hessian": hessian_s,
            "solve": solved - start,
            "write": time.perf_counter() - solved,
        }
        self._close_block()
        layers = [dataclasses.asdict(layer) for layer in records]
        result = {"layers": layers, "seconds": seconds, "bytes_read": opened.unit.read_bytes, **self.describe()}
        finished = spec.run.finish(opened.unit.name, [path], result)
        spec.run.drop_hidden("original", index)
        return finished

    @torch.no_grad()
    def advance(self, index: int) -> dict[str, Any]:
        """Held-out chunks through a quantized block, read back from the shard that was written."""
        start = time.perf_counter()
        self._close_block()
        unit, run = self._spec.plan.blocks[index], self._spec.run
        tensors, _ = load_tensors(run.model / unit.file)
        for linear in unit.linears:
            weight = compressed_tensors.unpack_linear(linear.stem, tensors, self._spec.quantization).dequantize()
            tensors[linear.key] = weight.to(self._spec.compute_dtype)
        block = self._skeleton.blocks[index]
        self._skeleton.load(block, {key: tensors[key] for key in unit.keys}, self._device)
        calls: dict[tuple[int, int], BlockCall] = {}
        for chunk in self._held_out():
            hidden = self._hidden("quantized", index, chunk)
            self._hand_on("quantized", index + 1, chunk, forward(block, hidden, self._call(index, hidden, calls)))
        block.to("meta")
        finished = run.finish(f"quantized-{index:04d}", [], {"seconds": {"evaluate": time.perf_counter() - start}})
        run.drop_hidden("quantized", index)
        return finished

    @torch.no_grad()
    def head(self, stream: str) -> dict[str, Any]:
        """Negative log-likelihood of the held-out tokens, from the last block's output of a stream."""
        run, last = self._spec.run, len(self._spec.plan.blocks)
        total, count = 0.0, 0
        with self._outside_loaded():
            for chunk in self._held_out():
                hidden, input_ids = self._hidden(stream, last, chunk), self._input_ids(chunk)
                as_tuple = load_call(run.calls(*input_ids.shape), 0, self._device)[1]
                for i in range(len(hidden)):  # one sequence at a time bounds the logits
                    ids = input_ids[i : i + 1]
                    logits = run_head(self._skeleton, ids, hidden[i : i + 1], as_tuple)[0, :-1].float()
                    total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
                    count += ids.shape[1] - 1
        if not math.isfinite(total):
            raise NumericalError(
                f"the {stream} model's loss on the held-out text is {total}; a forward pass overflowed"
            )
        finished = run.finish(f"head-{stream}", [], {"negative_log_likelihood": total, "tokens": count})
        run.drop_hidden(stream, last)
        return finished

    @contextmanager
    def _outside_loaded(self, with_block: BlockUnit | None = None) -> Iterator[None]:
        """Embeddings, norm and head, and one block where wanted, on the device for a while."""
        self._close_block()
        skeleton = self._skeleton
        keys = (*self._spec.plan.outside, *(with_block.keys if with_block else ()))
        skeleton.load(skeleton.model, self._checkpoint.read(keys), self._device)
        skeleton.model.tie_weights()
        try:
            yield
        finally:
            skeleton.model.to("meta")
            skeleton.model.tie_weights()
            _return_freed_memory()

    def _opened(self, index: int) -> _OpenBlock:
        if self._open is None or self._open.unit.index != index:
            raise RunError(f"block-{index:04d} is not open on this worker; it was restarted in between")
        return self._open

    def _close_block(self) -> None:
        if self._open is not None:
            self._skeleton.blocks[self._open.unit.index].to("meta")
            self._open = None
            _return_freed_memory()

    def _linear_modules(self, unit: BlockUnit) -> dict[str, torch.nn.Linear]:
        modules = {linear.name: self._skeleton.model.get_submodule(linear.name) for linear in unit.linears}
        return {name: module for name, module in modules.items() if isinstance(module, torch.nn.Linear)}

    def _require_finite(self, unit: BlockUnit) -> None:
        for name, parameter in self._skeleton.blocks[unit.index].named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise CheckpointError(f"{self._spec.source}: {name} of {unit.name} holds NaN or Inf")

    def _stored_dtype(self, unit: BlockUnit) -> torch.dtype:
        dtypes = [self._checkpoint.entries[linear.key].float_dtype for linear in unit.linears]
        return dtypes[0] or self._spec.compute_dtype if dtypes else self._spec.compute_dtype

    def _weights(self, unit: BlockUnit, stored: torch.dtype) -> dict[str, torch.Tensor]:
        """Original weights of the open block: the loaded ones where the compute dtype holds them exactly."""
        if torch.promote_types(stored, self._spec.compute_dtype) == self._spec.compute_dtype:
            return {name: module.weight.detach() for name, module in self._linear_modules(unit).items()}
        read = self._checkpoint.read(linear.key for linear in unit.linears)
        return {linear.name: read[linear.key].to(self._device) for linear in unit.linears}

    def _held_out(self) -> list[str]:
        return [chunk for chunk in self._spec.chunks if is_held_out(chunk)]

    def _input_ids(self, chunk: str) -> torch.Tensor:
        if self._tokens is None:
            self._tokens, _ = load_tensors(self._spec.run.tokens)
        return self._tokens[chunk].to(self._device)

    def _hidden(self, stream: str, index: int, chunk: str) -> torch.Tensor:
        tensors, _ = load_tensors(self._spec.run.hidden(stream, index, chunk))
        return tensors["hidden"].to(self._device)

    def _hand_on(self, stream: str, index: int, chunk: str, hidden: torch.Tensor) -> None:
        # What is there stays: an activation computed on other hardware may differ in its last bits.
        path = self._spec.run.hidden(stream, index, chunk)
        if not path.exists():
            save_tensors(path, {"hidden": hidden})

    def _call(self, index: int, hidden: torch.Tensor, calls: dict[tuple[int, int], BlockCall]) -> BlockCall:
        shape = (hidden.shape[0], hidden.shape[1])
        if shape not in calls:
            calls[shape], _ = load_call(self._spec.run.calls(*shape), index, self._device)
        return calls[shape]
