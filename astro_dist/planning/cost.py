"""What a run costs, from headers and configuration alone: operations, bytes, time and memory. Pure.

A product of [m, k] and [k, n] counts 2 m k n operations.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import assert_never

from astro.config import PER_CHANNEL, Quantization, Regularizer
from astro.linalg.tiling import row_tile, row_tiles
from astro.quantization.beta_search import NUM_CANDIDATES, sample_tiles
from astro.quantization.grid import num_candidates
from astro.quantization.regularizer import PROX_PASSES
from astro.quantization.row_solver import num_sample_rows
from astro_dist.config.schema import RunConfig
from astro_dist.planning.devices import Device
from astro_dist.planning.predicted_groups import PredictedInputGroup, predicted_input_groups, stages_of, together
from astro_dist.planning.units import BlockUnit, Plan
from astro_dist.schedule.calls import (
    AccumulateHessians,
    BatchParts,
    BlockParts,
    Call,
    CopyTensors,
    Embed,
    EvaluateLoss,
    FinishEvaluation,
    Forward,
    ForwardChunk,
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
from astro_dist.schedule.names import is_held_out
from astro_dist.schedule.sequential import shares

__all__ = ["CostModel", "Work"]

_CANDIDATE_PASSES = 4
"""Elementwise operations for each candidate of a scale: divide, round, limit, weigh, as `grid._group_error` does them,
four reads and writes of an element beside the sums. They are counted at the speed of the proximal map's passes."""
_COLUMN_STEPS = (5.5, 4.0)
"""Small dependent operations for a column in GPTQ, and in a pass of refinement: five calls of
GPTQ (divide, round, limit, the error, what later columns take of it) and three of refinement (round, limit, what later
columns take of it), and half a call and one more for what a block of columns takes besides."""
_COMPILED_STEPS = (0.5, 0.6)
"""The same where 16 columns are a kernel or two: 0.27 and 0.51 launches, counted, and in round numbers what a solve
launches besides (`tests/bench/launches.py`)."""
_LIBRARIES_BYTES = 430_000_000
"""Resident memory of a CPU worker before it does anything: Python, torch, transformers, Ray. A process
that has imported `ray` and `astro_dist.worker.worker` peaks at 390 MB (`astro.process.peak_rss_bytes`); the rest is
for what an actor of Ray holds besides."""
_STATES = 6
"""Hidden states that a block's forward holds at its peak: the residual, its norm, queries, keys, values and attention's
output."""
_LOGITS = 3
"""Float32 copies of one sequence's logits that the loss holds at its peak: logits, their float32 form, the softmax."""
_PACKED_BYTES = 2.1
"""Bytes of a Hessian in a file over its columns squared. One half of it is kept in float32, so 2, and a little more
for the squares on the diagonal: 256 columns are one strip, of 5120 columns 2.1 bytes are kept."""
_SQUARES, _TILES = 2.5, 9
"""Matrices of columns × columns beside the Hessian (the factor, the regularizer's operator, one half while either is
made), and arrays of a row tile (weights, target, both transposed, errors, integers, slopes, grid and figures), that a
solve holds at its peak. `tests/bench/memory.py` compares the sum with what a run takes."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call does.

    Attributes:
        compute: operations in the compute dtype: forward passes, on a GPU statistics too.
        rounded: operations on bfloat16 factors where those are faster: regularization and refinement.
        exact: operations in float32: all else of the solve, on a CPU statistics too.
        elements: that elementwise operations go through: proximal map, candidates of scales.
        steps: dependent small operations: columns of GPTQ and refinement.
        moved_bytes: read from and written to the shared folder.
    """

    compute: float = 0.0
    rounded: float = 0.0
    exact: float = 0.0
    elements: float = 0.0
    steps: float = 0.0
    moved_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        own, more = dataclasses.astuple(self), dataclasses.astuple(other)
        return Work(*(a + b for a, b in zip(own, more, strict=True)))

    def seconds(self, device: Device, half: bool) -> float:
        """Time on a device; `half` where forward passes run in 16 bits."""
        rate = device.bfloat16 if half else device.float32
        return (
            self.compute / rate + self.rounded / max(device.bfloat16, device.float32) + self.exact / device.float32
            + self.elements / device.elements + self.steps * device.step_s + self.moved_bytes / device.storage
        )  # fmt: skip


class CostModel:
    """Costs of a run's calls."""

    def __init__(
        self,
        plan: Plan,
        config: RunConfig,
        chunk_tokens: Mapping[str, int],
        itemsize: int,
        device_type: str,
    ) -> None:
        """Look at a run.

        Args:
            plan: every unit.
            config: of the run.
            chunk_tokens: tokens of each chunk by name, in the order in which they travel.
            itemsize: bytes of an element in the compute dtype.
            device_type: "cpu" or "cuda".
        """
        self._device_type = device_type
        self._column_steps = _COMPILED_STEPS if config.execution.compiles(device_type) else _COLUMN_STEPS
        self._known: dict[int, list[PredictedInputGroup]] = {}
        self._plan, self._tokens, self._itemsize = plan, dict(chunk_tokens), itemsize
        self._quantization: Quantization = config.quantization
        self._regularization: Regularizer = config.regularizer
        self._shares = shares(list(chunk_tokens), config.execution.hessian_shares)
        self._sequential, self._rounds = config.execution.mode == "sequential", config.execution.rounds
        self._compensated = self._sequential and config.quantization.compensates
        self._sequence_length = config.calibration.sequence_length
        self._held_out = sum(n for chunk, n in self._tokens.items() if is_held_out(chunk))
        self._calibration_tokens = sum(self._tokens.values()) - self._held_out
        self._all_tokens = config.experts.policy == "all-tokens"

    def work(self, call: Call) -> Work:
        """What a call does; attention's products of queries with keys are not counted."""
        plan = self._plan
        match call:
            case Embed():
                return Work(moved_bytes=self._activations(self._tokens) + plan.outside_weights * self._itemsize)
            case EvaluateLoss():
                compute = 2.0 * self._held_out * plan.outside_weights
                return Work(compute, moved_bytes=self._activations(self._held_out_chunks))
            case CopyTensors(index):
                return Work(moved_bytes=2.0 * plan.copies[index].read_bytes)
            case FinishEvaluation():
                return Work()
        return self._block_work(call, plan.blocks[call.block])

    def result(self, call: Call) -> Result:
        """What a schedule reads from the result of a call."""
        match call:
            case SplitBlock():
                batches = self._batches(self._plan.blocks[call.block])
                widest = sorted(range(len(batches)), key=lambda batch: -batches[batch].columns)
                return BlockParts(tuple(self._parts(batches, index) for index in widest))
            case AccumulateHessians():
                batches = self._batches(self._plan.blocks[call.block])
                stages = stages_of(batches)
                parts = tuple(self._parts(batches, index) for index in stages[call.stage])
                return BlockParts(parts, len(stages))
        return None

    def worker_bytes(self) -> int:
        """Peak memory of a CPU worker; a GPU's is less by the libraries. The largest of all blocks."""
        blocks = max(self._block_bytes(unit) for unit in self._plan.blocks)
        # Embeddings and head as they are stored, where that is not how they are used; the logits of one sequence.
        stored = sum(unit.read_bytes for unit in self._plan.copies) / max(self._plan.outside_weights, 1)
        outside = self._plan.outside_weights * (self._itemsize + (stored if stored != self._itemsize else 0))
        logits = 4 * _LOGITS * self._sequence_length * self._plan.vocab_size
        return int(_LIBRARIES_BYTES + max(blocks, outside + logits))

    def disk_bytes(self, workers: int) -> int:
        """Tell what the run directory holds at most, in bytes.

        That is the result, an earlier round, inputs of the blocks in flight, and in mode `sequential` the parts of one
        block.

        Args:
            workers: Number of workers.
        """
        inputs = self._activations(self._tokens)
        each = [self._batches(unit) for unit in self._plan.blocks]
        found = max(each, key=lambda found: sum(batch.square for batch in found))
        if not self._sequential:
            written = self._plan.written_bytes * min(self._rounds, 2)
            given_out = min(workers // 2, len(self._plan.blocks))
            squares = given_out * sum(_PACKED_BYTES * batch.square for batch in found)
            return int(written + (workers + 2) * self._rounds * inputs + squares)
        squares = (_PACKED_BYTES + 4.0 * self._compensated) * (
            sum(batch.square for batch in found) + self._widest(found)
        )
        tiles = sum(1.1 * batch.weights for batch in found)
        return int(self._plan.written_bytes + (4 + 3 * self._compensated) * inputs + squares + tiles)

    def _widest(self, found: list[PredictedInputGroup]) -> float:
        """Elements of all shares of the stage with the widest input."""
        stages = stages_of(found)
        return float(len(self._shares) * max(sum(found[i].square for i in stage) for stage in stages))

    def _block_bytes(self, unit: BlockUnit) -> int:
        found = self._batches(unit)
        weights = sum(batch.weights for batch in found)
        hessians = 0.0 if self._sequential else sum(self._statistics_bytes(batch) for batch in found)
        if any(batch.reach < 1 for batch in found) and self._all_tokens:
            # The inputs of the experts, should some of them see too few.
            hessians += self._calibration_tokens * self._plan.hidden_size * self._itemsize
        solving = max((self._solving_bytes(batch) for batch in found), default=0.0)
        widest = max([self._plan.hidden_size, *(batch.columns for batch in found)])
        tokens = max(self._tokens.values())
        inputs = (3 * self._itemsize + 4) * (2 if self._compensated else 1)  # of both streams, and their drift
        forwarding = tokens * (_STATES * self._plan.hidden_size * self._itemsize + widest * inputs)
        # Quantized layers wait as bytes until the shard is written.
        phase = max(forwarding, solving + weights)
        parameters: dict[str, float] = {}
        for linear in unit.linears:
            parameters[linear.parameter] = parameters.get(linear.parameter, 0.0) + linear.rows * linear.columns
        # As it is stored and as it is used, and again the largest parameter while it is put together from experts.
        loading = unit.read_bytes + 2 * self._itemsize * max(parameters.values(), default=0.0)
        # Layers that are not quantized are there too.
        return int(max(weights * self._itemsize, unit.read_bytes) + max(hessians + phase, loading))

    def _solving_bytes(self, batch: PredictedInputGroup) -> float:
        tile = min(batch.count * batch.rows, row_tile(batch.columns, self._device_type))
        squares = _SQUARES + (2 if self._sequential else 0)
        return 4.0 * (squares * batch.square + batch.weights + _TILES * tile * batch.columns)

    def _statistics_bytes(self, batch: PredictedInputGroup) -> float:
        """Of a Hessian, or of the inputs that an expert keeps instead while they are smaller."""
        square = 4.0 * batch.square
        kept = batch.count * self._calibration_tokens * batch.reach * batch.columns * self._itemsize
        return square if batch.reach == 1 else min(square, kept)

    def _block_work(
        self,
        call: OpenBlock | Forward | ForwardChunk | SolveBlock | SplitBlock | AccumulateHessians | PartCall | WriteBlock,
        unit: BlockUnit,
    ) -> Work:
        """What a call for a block does."""
        match call:
            case OpenBlock():
                return Work(moved_bytes=unit.read_bytes if call.round_index == 0 else unit.written_bytes)
            case Forward() | ForwardChunk():
                tokens = self._tokens[call.chunk]
                passed = Work(self._forward(unit, tokens), moved_bytes=2.0 * self._activations([call.chunk]))
                counts = isinstance(call, Forward) and not is_held_out(call.chunk)
                return passed + self._hessian(self._batches(unit), tokens) if counts else passed
            case SolveBlock():
                solved = (self._solve(batch, call.round_index) for batch in self._batches(unit))
                return sum(solved, Work(moved_bytes=unit.written_bytes))
            case WriteBlock():
                # Tiles hold a byte a weight.
                return Work(moved_bytes=3.0 * unit.written_bytes)
            case SplitBlock():
                return Work(moved_bytes=sum(_PACKED_BYTES * batch.square for batch in self._batches(unit)))
            case AccumulateHessians():
                return self._share_work(call, unit)
            case MergeHessians() | TryBetas() | SolveRows():
                return self._part_work(call, unit)
        assert_never(call)

    def _share_work(self, call: AccumulateHessians, unit: BlockUnit) -> Work:
        """What it takes to sum the Hessians of one stage over one share of the chunks."""
        batches = self._batches(unit)
        stages = stages_of(batches)
        stage = [batches[i] for i in stages[min(call.stage, len(stages) - 1)]]
        square = sum((_PACKED_BYTES + 4.0 * self._compensated) * batch.square for batch in stage)
        chunks = self._shares[call.share]
        tokens = sum(self._tokens[chunk] for chunk in chunks)
        streams = 1 + self._compensated
        # A stage's inputs take the block's forward up to that stage; which worker has the block already is open.
        passed = (call.stage + 1) / len(stages)
        moved = streams * self._activations(chunks) + square + unit.read_bytes
        sums = self._hessian(stage, tokens, self._compensated)
        return sums + Work(streams * passed * self._forward(unit, tokens), moved_bytes=moved)

    def _part_work(self, call: PartCall, unit: BlockUnit) -> Work:
        """What a call does by which several workers solve a block."""
        batches = self._batches(unit)
        batch = batches[min(call.batch, len(batches) - 1)]
        square = (_PACKED_BYTES + 4.0 * self._compensated) * batch.square
        weights = batch.weights * self._itemsize
        if isinstance(call, MergeHessians):
            moved = square * (len(self._shares) + 1 if self._sequential else 1) + weights
            return self._prepare(batch) + self._measure_widths(batch, call.round_index) + Work(moved_bytes=moved)
        # Which worker has the batch prepared already is open.
        entered = self._prepare(batch) + Work(moved_bytes=square + weights)
        if isinstance(call, TryBetas):
            return entered + self._weigh_tiles(batch, [_nearest(self._sample_tiles(batch), call.tile)])
        tile = _nearest(self._tiles(batch), call.tile)
        written = 5.0 * batch.count * (tile.stop - tile.start) * batch.columns
        return entered + self._solve_tiles(batch, [tile], self._iterations) + Work(moved_bytes=written)

    def _solve(self, batch: PredictedInputGroup, round_index: int) -> Work:
        """All of a batch by one worker."""
        searched = self._weigh_tiles(batch, self._sample_tiles(batch))
        all_rows = self._solve_tiles(batch, self._tiles(batch), self._iterations)
        return self._prepare(batch) + searched + all_rows + self._measure_widths(batch, round_index)

    @property
    def _iterations(self) -> int:
        """Iterations of the regularizer; 0 where nothing is regularized."""
        regularization = self._regularization
        return 0 if regularization.name == "none" or regularization.beta == 0 else regularization.steps

    @property
    def _is_factored(self) -> bool:
        return self._quantization.method == "gptq"

    def _prepare(self, batch: PredictedInputGroup) -> Work:
        """The Cholesky factor of GPTQ, C³/3 operations, and the inverse of ADMM, C³: each only where it is taken."""
        inverted = bool(self._iterations) and self._regularization.solver == "admm"
        return Work(exact=(self._is_factored / 3.0 + inverted) * batch.square * batch.columns)

    def _measure_widths(self, batch: PredictedInputGroup, round_index: int) -> Work:
        """What a width budget takes in its first round: sampled rows are solved once for each width."""
        if self._quantization.bits != "auto" or round_index:
            return Work()
        rows = [slice(0, num_sample_rows(batch.rows))]
        each = self._solve_tiles(batch, rows, iterations=0)
        return sum([each] * len(self._quantization.bit_choices), Work())

    def _weigh_tiles(self, batch: PredictedInputGroup, tiles: list[slice]) -> Work:
        """Regularization, GPTQ and errors of sampled rows under every candidate."""
        return self._quantize_tiles(batch, tiles, self._iterations, NUM_CANDIDATES, products=0.5, passes=0)

    def _solve_tiles(self, batch: PredictedInputGroup, tiles: list[slice], iterations: int) -> Work:
        """Regularization, GPTQ, refinement and figures of tiles."""
        settings = self._quantization
        passes = settings.refine_passes if self._is_factored else 0
        # A pass takes a product span by span, and of a wide group within it half of one, and one for its scale.
        size = batch.columns if settings.group_size == PER_CHANNEL else settings.group_size
        wider = 1.5 * size / batch.columns
        # Of figures half a product is what a result is compared with, where it was refined half of another one.
        products = 1 + 0.5 * bool(passes) + passes * wider
        solved = self._quantize_tiles(batch, tiles, iterations, 1, products, passes)
        return solved + Work(rounded=passes * 2.0 * batch.columns * self._elements(batch, tiles))

    def _elements(self, batch: PredictedInputGroup, tiles: list[slice]) -> float:
        return float(batch.count * sum(tile.stop - tile.start for tile in tiles) * batch.columns)

    def _quantize_tiles(
        self, batch: PredictedInputGroup, tiles: list[slice], iterations: int, copies: int, products: float, passes: int
    ) -> Work:
        """What tiles take that hold so many copies of each row.

        They are regularized by so many iterations and put on their grids; besides, there are products with H, as many
        as `products` says, and passes of refinement over the columns.
        """
        solving, refining = self._column_steps
        elements = copies * self._elements(batch, tiles)
        elementwise = (
            iterations * PROX_PASSES
            + num_candidates(self._quantization.symmetric, self._quantization) * _CANDIDATE_PASSES
        )
        product = 2.0 * batch.columns * elements
        published = self._regularization.solver == "pgd"
        # The first iteration of ADMM takes no product.
        regularized = Work(exact=iterations * product) if published else Work(rounded=max(iterations - 1, 0) * product)
        return regularized + Work(
            # GPTQ multiplies the errors with one half of its factor; rounding to nearest has neither.
            exact=(0.5 * self._is_factored + products) * product,
            elements=elementwise * elements,
            steps=len(tiles) * batch.columns * (solving * self._is_factored + passes * refining),
        )

    def _forward(self, unit: BlockUnit, tokens: int) -> float:
        return 2.0 * tokens * sum(batch.reach * batch.weights for batch in self._batches(unit))

    def _hessian(self, batches: Iterable[PredictedInputGroup], tokens: int, drift: bool = False) -> Work:
        """XᵀX on and above the diagonal, and the drift. A GPU multiplies 16-bit inputs as they are, a drift as two."""
        halves = self._device_type == "cuda" and self._itemsize == 2
        operations = tokens * sum(batch.reach * batch.square for batch in batches)
        operations *= 1.0 + drift * (4.0 if halves else 2.0)
        return Work(operations) if halves else Work(exact=operations)

    def _batches(self, unit: BlockUnit) -> list[PredictedInputGroup]:
        if unit.index not in self._known:
            groups = predicted_input_groups(unit.linears, self._plan.expert_share)
            self._known[unit.index] = together(groups, self._device_type)
        return self._known[unit.index]

    def _tiles(self, batch: PredictedInputGroup) -> list[slice]:
        return row_tiles(batch.rows, batch.columns, self._device_type, copies=batch.count)

    def _sample_tiles(self, batch: PredictedInputGroup) -> list[slice]:
        is_searched = self._regularization.is_searched
        tiles = sample_tiles(batch.rows, batch.columns, self._device_type, batch.count)
        return tiles if is_searched else []

    def _parts(self, batches: list[PredictedInputGroup], index: int) -> BatchParts:
        """The calls that a batch takes once its Hessians are merged."""
        batch = batches[index]
        return BatchParts(index, len(self._sample_tiles(batch)), len(self._tiles(batch)))

    @property
    def _held_out_chunks(self) -> list[str]:
        return [chunk for chunk in self._tokens if is_held_out(chunk)]

    def _activations(self, chunks: Iterable[str]) -> float:
        return float(sum(self._tokens[chunk] for chunk in chunks) * self._plan.hidden_size * self._itemsize)


def _nearest(tiles: list[slice], index: int) -> slice:
    """The tile of an index, or the last: overrides may cut a block into more tiles than the headers let foresee."""
    return tiles[min(index, len(tiles) - 1)]
