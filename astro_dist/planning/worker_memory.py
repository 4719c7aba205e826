"""The memory that a worker takes at its largest block, foretold from headers and configuration alone.

A worker holds its block, the statistics of its layers, and either what a forward or a backward pass of one chunk takes,
or what the solve of one batch of input groups takes.
"""

import itertools

import torch

from astro.calibration.hessian import summed_dtype
from astro.calibration.rounded_sample import MOST_ROWS
from astro.config import PER_CHANNEL
from astro.linalg.tiling import row_tile
from astro.model.scaling_places import WIDE_BYTES
from astro_dist.config.schema import RunConfig
from astro_dist.planning.correction_cost import correction_size, rounding_drifts
from astro_dist.planning.devices import CUDA_CONTEXT_BYTES
from astro_dist.planning.forward_memory import ForwardMemory
from astro_dist.planning.predicted_groups import PredictedInputGroup, predicted_input_groups, stages_of, together
from astro_dist.planning.units import BlockUnit, Plan

__all__ = ["WorkerMemory"]

_LIBRARIES_BYTES = 870_000_000 if torch.version.cuda else 500_000_000
"""Resident memory of a CPU worker beside all arrays: Python, torch, transformers, Ray. A process that has imported
`ray` and `astro_dist.worker.worker` peaks at 390 MB, and at 760 MB where torch is built for CUDA
(`astro.process.peak_rss_bytes`). An actor of Ray holds 430 MB before its first block, and some tens more when its
threads have read and written."""
_TRAVELLING = 3
"""Hidden states of other chunks that are held meanwhile: an input that is read ahead, an output that is computed ahead,
and an output that is being written."""
_PINNED = 2
"""Largest size of a pinned buffer relative to what it is asked for."""
_LOGITS = 4
"""Float32 copies of one sequence's logits that are held at the peak: logits, their float32 form, logarithms, and the
gradients of these. Two models' logits and what comparing parts of them takes are less."""
_SQUARES, _TILES = 2.5, 9
"""What a solve holds at its peak: matrices of columns × columns beside the Hessian (the factor, the regularizer's
operator, one half while either is made), and arrays of a row tile (weights, target, both transposed, errors, integers,
slopes, grid and figures). `tests/bench/memory.py` compares the sum with what a run takes, and
`tests/astro_dist/planning/test_worker_memory.py` with tensors of the true sizes of large models."""

_CORRECTING_TILES = 3
"""Arrays of a row tile that a correction holds at its peak: what was aimed at, a product for it, dequantized rows."""
_ROUNDED_TILES = 4
"""The same for what is besides computed of a row tile where inputs are rounded: the weights before they make up for
that, the quantized weights, and the outputs of both on as many tokens as there are columns."""
_FACTORED_INPUTS, _UNROUNDED_INPUTS = 4, 3
"""Matrices of columns × columns that a correction holds beside the Hessian and drifts, where it reads inputs that are
not rounded: the factor of the solve, their Hessian, and two while that is factored or then its factor."""


class WorkerMemory:
    """Foretells what a worker holds, for chunks of any size."""

    def __init__(self, plan: Plan, config: RunConfig, dtype: torch.dtype, device_type: str) -> None:
        """Look at a run.

        Args:
            plan: Units of the run.
            config: Configuration of the run; the size of its chunks is not read.
            dtype: Dtype of forward passes.
            device_type: Type of the device, "cpu" or "cuda".
        """
        self._plan, self._device_type, self._itemsize = plan, device_type, dtype.itemsize
        calibration = config.calibration
        self._sequence_length = calibration.longest_sequence
        self._calibration_tokens = calibration.most_samples * calibration.longest_sequence
        self._sequential = config.execution.mode == "sequential"
        self._in_stages = config.execution.mode == "stages"
        self._compensated = self._sequential and config.quantization.compensates
        self._compares_streams = config.makes_up_for_layers
        self._reconstruction = config.reconstruction
        holds_channels = config.reconstruction.holds_channels(config.activations)
        self._held_columns = config.activations.outlier_channels if holds_channels else 0
        self._is_rounded = config.activations.scheme is not None
        self._drifts = {is_corrected: rounding_drifts(config, is_corrected) for is_corrected in (False, True)}
        self._corrects_rounding = config.reconstruction.minds_rounding(config.activations)
        self._all_tokens = config.experts.policy == "all-tokens"
        self._weighs_by_loss = calibration.token_weights == "loss"
        self._smooths = config.activations.smoothing != "none"
        is_weighted = calibration.token_weights != "none"
        self._tuned_steps = config.quantization.tune_steps
        group_size = config.quantization.group_size
        self._scaled_columns = plan.hidden_size if group_size == PER_CHANNEL else group_size
        self._summed_itemsize = summed_dtype(dtype, device_type, is_weighted).itemsize
        self._forward = ForwardMemory(plan, calibration.longest_sequence, dtype, device_type)
        share = plan.expert_share
        self._tile_elements = tile = config.execution.tile_elements(device_type)
        self._batches = [together(predicted_input_groups(unit.linears, share), tile) for unit in plan.blocks]

    def bytes(self, sequences: int) -> int:
        """Return the most that a worker holds, in bytes: of a GPU's memory, or, without one, of the machine's.

        Args:
            sequences: Number of sequences in the largest chunk.
        """
        plan = self._plan
        blocks = max(
            self._block_bytes(unit, batches, sequences)
            for unit, batches in zip(plan.blocks, self._batches, strict=True)
        )
        # Embeddings and head as they are stored, where that is not how they are used; the logits of one sequence.
        stored = sum(unit.written_bytes for unit in plan.copies) / max(plan.outside_weights, 1)
        outside = plan.outside_weights * (self._itemsize + (stored if stored != self._itemsize else 0))
        logits = 4 * _LOGITS * self._sequence_length * plan.vocab_size
        before = CUDA_CONTEXT_BYTES if self._device_type == "cuda" else _LIBRARIES_BYTES
        # At the head states are read, computed and written ahead too, and the gradient of one is put together.
        travelling = (_TRAVELLING + 2 * self._weighs_by_loss) * self._state_bytes(sequences)
        return int(before + max(blocks, outside + logits + travelling))

    def of_host(self, sequences: int) -> int:
        """Return the most that a worker on a GPU takes of its host's memory, in bytes.

        Pinned memory comes in powers of two. The next block's weights are there as they are read, and pinned; or
        embeddings and head, as they are read. In mode `sequential` there are two shares of Hessians besides.

        Args:
            sequences: Number of sequences in the largest chunk.
        """
        weights = max((unit.held_bytes for unit in self._plan.blocks), default=0)
        outside = sum(unit.written_bytes for unit in self._plan.copies)
        # One that is added up, and the next one, which is read meanwhile.
        shares = 2.0 * self._sequential * max(map(self._share_file_bytes, itertools.chain(*self._batches)), default=0.0)
        return int(
            _LIBRARIES_BYTES
            + shares
            + max(weights, outside)
            + _PINNED * (weights + _TRAVELLING * self._state_bytes(sequences))
        )

    def _state_bytes(self, sequences: int) -> float:
        """Size of the hidden states of a chunk."""
        return float(sequences * self._sequence_length * self._plan.hidden_size * self._itemsize)

    def _block_bytes(self, unit: BlockUnit, batches: list[PredictedInputGroup], sequences: int) -> int:
        weights = sum(batch.weights for batch in batches)
        summed_at_once = not self._sequential and not self._in_stages
        hessians = sum(self._statistics_bytes(batch) for batch in batches) if summed_at_once else 0.0
        if any(batch.reach < 1 for batch in batches) and self._all_tokens:
            # The inputs of the experts, should some of them see too few.
            hessians += self._calibration_tokens * self._plan.hidden_size * self._itemsize
        solving = max((self._solving_bytes(batch) for batch in batches), default=0.0)
        forwarding = self._forward.forth(batches, sequences, 1 + self._compares_streams, self._is_rounded)
        if self._sequential:
            # The quantized weights of earlier stages, and the sums of a stage.
            stages = ([batches[i] for i in stage] for stage in stages_of(batches))
            sums = max((sum(map(self._share_bytes, stage)) for stage in stages), default=0.0)
            forwarding += weights * self._itemsize + sums
        else:
            solving += weights  # quantized layers wait as bytes until the shard is written
            # A product that is added to a drift.
            drifting = (4.0 * batch.square / batch.count for batch in batches if self._rounding_drifts(batch))
            forwarding += max(drifting, default=0.0)
        solving += correction_size([unit], self._reconstruction).size_bytes  # they wait too
        travelling = _TRAVELLING * self._state_bytes(sequences)
        phase = max(forwarding + travelling, solving)
        if self._in_stages:
            phase = self._staged_bytes(unit, batches, forwarding + travelling, solving)
        if self._weighs_by_loss:
            # Gradients are read beside the states.
            phase = max(phase, self._forward.back(batches, sequences) + travelling + self._state_bytes(sequences))
        parameters: dict[str, float] = {}
        for linear in unit.linears:
            parameters[linear.parameter] = parameters.get(linear.parameter, 0.0) + linear.rows * linear.columns
        # As it is read and as it is used, and again the largest parameter while it is put together from experts.
        loading = unit.held_bytes + 2 * self._itemsize * max(parameters.values(), default=0.0)
        if self._smooths:
            # The block as it is read, as it is smoothed, and in float64 unless it is too large for that.
            tried = 8.0 * weights if 8 * weights <= WIDE_BYTES else self._itemsize * weights
            loading = max(loading, 2 * unit.held_bytes + tried)
        # The Hessians are gone by then.
        tuning = self._tuning_bytes(unit, batches, sequences)
        # Layers that are not quantized are there too.
        return int(max(weights * self._itemsize, unit.held_bytes) + max(hessians + phase, tuning, loading))

    def _staged_bytes(
        self, unit: BlockUnit, batches: list[PredictedInputGroup], forwarding: float, solving: float
    ) -> float:
        """Size of what is held while a block is solved stage by stage: the sums of a stage, and layers before it.

        Args:
            unit: Unit of the block.
            batches: Input groups of the block.
            forwarding: What passes of a chunk hold.
            solving: What the solve of the largest batch holds beside its sums, and the quantized layers.
        """
        # The layers of earlier stages, which the block computes with. Experts that share a parameter change places with
        # a copy of what they were.
        weights = sum(batch.weights for batch in batches)
        apart = sum(batch.weights for batch in batches if batch.reach < 1)
        earlier = (weights + apart) * self._itemsize
        forwarding += weights + correction_size([unit], self._reconstruction).size_bytes  # quantized layers wait
        largest = 0.0
        for stage in ([batches[i] for i in stage] for stage in stages_of(batches)):
            sums = sum(map(self._statistics_bytes, stage))
            drift = 4.0 * sum(batch.square for batch in stage if self._compares_streams and batch.reach == 1)
            # Of every other chunk there is a drift apart, and a product is added to one of them. In the end it is known
            # how far they lie apart, which waits in the memory of the machine.
            waiting = drift if self._device_type == "cpu" else 0.0
            largest = max(largest, sums + 3 * drift + forwarding, sums + drift + waiting + solving)
        return earlier + largest

    def _solving_bytes(self, batch: PredictedInputGroup) -> float:
        tile = min(batch.count * batch.rows, row_tile(batch.columns, self._tile_elements))
        # In mode `sequential` the Hessian itself, and the drift; experts have none.
        drifts = (self._compensated and batch.reach == 1) + self._sequential * self._rounding_drifts(batch)
        squares, tiles = _SQUARES + self._sequential + drifts, _TILES + self._is_rounded * _ROUNDED_TILES
        solving = squares * batch.square + tiles * tile * batch.columns
        if self._reconstruction.is_on and batch.reach == 1:
            # The errors of all rows of a layer and the integers of all rows, beside arrays of a tile of rows.
            tiles = _CORRECTING_TILES + self._is_rounded * _ROUNDED_TILES
            correcting = 1.25 * batch.weights + tiles * tile * batch.columns
            if self._corrects_rounding:
                beside = self._sequential + drifts
                correcting += (_UNROUNDED_INPUTS + beside) * batch.square
                solving = max(solving, (_FACTORED_INPUTS + beside) * batch.square)
            else:
                correcting += squares * batch.square
            # Columns that corrections hold were taken out of the weights.
            solving = max(solving, correcting) + batch.count * batch.rows * self._held_columns
        return 4.0 * (solving + batch.weights)

    def _tuning_bytes(self, unit: BlockUnit, batches: list[PredictedInputGroup], sequences: int) -> float:
        """Size of what is held while the scales of a block are tuned; 0 where they are not."""
        if not self._tuned_steps:
            return 0.0
        tuned = min(self._tuned_steps + sequences - 1, self._calibration_tokens // self._sequence_length)
        # Experts that are run one after the other have gradients of their own.
        apart = not self._plan.forward_shape.dense_experts
        sizes: dict[tuple[str, int | None], float] = {}
        for linear in unit.linears:
            key = linear.parameter, linear.expert if apart else None
            sizes[key] = sizes.get(key, 0.0) + linear.rows * linear.columns
        held = self._forward.tuned(batches, tuned, self._scaled_columns, max(sizes.values(), default=0.0))
        return held + correction_size([unit], self._reconstruction).size_bytes

    def _rounding_drifts(self, batch: PredictedInputGroup) -> int:
        """Number of matrices of columns × columns about what rounding takes from the inputs of a layer."""
        return self._drifts[batch.reach == 1]

    def _share_bytes(self, batch: PredictedInputGroup) -> float:
        """Size of what is summed over a share: the statistics, and a drift, to which a product as large is added."""
        drift = 8.0 * batch.square if self._compensated and batch.reach == 1 else 0.0
        product = 4.0 * batch.square / batch.count if self._rounding_drifts(batch) and not drift else 0.0
        return self._statistics_bytes(batch) + drift + product

    def _share_file_bytes(self, batch: PredictedInputGroup) -> float:
        """Size of a share in a file: half of each Hessian, and whole drifts."""
        drifts = (self._compensated and batch.reach == 1) + self._rounding_drifts(batch)
        return (2.0 + 4.0 * drifts) * batch.square

    def _statistics_bytes(self, batch: PredictedInputGroup) -> float:
        """Size of Hessians, or of the inputs that experts keep instead while they are smaller.

        Where inputs are rounded there is a sample of tokens before and after, and the drifts or their factors.
        """
        squares, tokens = 4.0 * batch.square, self._calibration_tokens * batch.reach
        inputs = batch.count * tokens * batch.columns
        size = squares if batch.reach == 1 else min(squares, inputs * self._summed_itemsize)
        if self._is_rounded:
            size += 8.0 * batch.count * min(tokens, MOST_ROWS) * batch.columns
        drift = squares if batch.reach == 1 else min(squares, inputs * (4.0 + self._itemsize))
        size += self._rounding_drifts(batch) * drift
        return size
