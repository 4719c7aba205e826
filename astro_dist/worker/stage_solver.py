"""The solve of a block stage by stage, by one worker: blocks stay independent of each other, and layers do not.

Each stage is calibrated behind the quantized layers of the stages before it, and its weights make up for their errors.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial

from astro.calibration.block_statistics import input_stages
from astro.calibration.stage_statistics import StageStatistics
from astro.calibration.starved_experts import AllTokens, InputStatistics
from astro.model.cache_scales import LargestByModule
from astro.model.operands import Operand, names_of
from astro.quantization.block import quantize_block
from astro.quantization.grid import QuantizedLinear
from astro.quantization.layer_record import LayerRecord
from astro.timing import add_seconds, clock_s, timed
from astro_dist.run_directory.layer_widths import layer_schemes
from astro_dist.schedule.names import ORIGINAL, round_stream
from astro_dist.worker.block_recipe import sum_kind
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.fed_block import FedBlock
from astro_dist.worker.solved_block import SolvedBlock
from astro_dist.worker.solved_stages import SolvedLayers, put_in
from astro_dist.worker.stage_inputs import StageInputs
from astro_dist.worker.token_weigher import read_token_weights

__all__ = ["StageSolver"]

_RESULT = round_stream(0)
"""The stream through what the only round writes."""


class StageSolver:
    """Solves one block, whose calibration inputs are all there."""

    def __init__(self, runner: BlockRunner, fed_block: FedBlock) -> None:
        """Look at a block.

        Args:
            runner: Runner of the worker's blocks, which holds the block of the source.
            fed_block: The block.
        """
        self._runner, self._fed_block = runner, fed_block
        self._unit, self._layers = fed_block.unit, runner.layers(fed_block.unit)
        self._weights = read_token_weights(runner, fed_block.unit)
        self._chunks = runner.spec.calibration_chunks
        self._largest = LargestByModule()
        self._earlier = SolvedLayers()
        self._seconds = fed_block.feeding_seconds()

    def solve(self) -> SolvedBlock:
        """Quantize the layers of all stages in turn.

        Raises:
            NumericalError: A layer was never reached or saw values that are not finite, its Hessian cannot be factored
                within the damping limit, or an expert saw too few tokens and the policy is `fail`.
        """
        runner, unit, spec = self._runner, self._unit, self._runner.spec
        schemes, recipe = layer_schemes(spec.run, spec.quantization, unit, 0), runner.recipe(unit)
        solved: dict[str, QuantizedLinear] = {}
        records: list[LayerRecord] = []
        for stage in self._stages():
            statistics = self._finished(self._summed(stage))
            weights = runner.weights(unit, names_of(operand for group in stage for operand in group))
            of_stage, of_records = quantize_block(weights, list(map(names_of, stage)), statistics, schemes, recipe)
            solved |= of_stage
            records += of_records
            self._earlier = self._earlier.with_layers(of_stage.items(), spec.compute_dtype)
        return SolvedBlock(solved, records, self._seconds, self._largest.scales)

    def _stages(self) -> list[list[list[Operand]]]:
        if not self._unit.linears:
            return []
        runner, chunk = self._runner, self._chunks[0]
        with timed(self._seconds, "forward", runner.device):
            state = runner.states.read(ORIGINAL, self._unit.index, chunk)
            return input_stages(self._layers, lambda: runner.forward(self._unit.index, state, chunk))

    def _summed(self, stage: Sequence[Sequence[Operand]]) -> StageStatistics:
        """Pass all chunks through the block up to a stage, and sum the inputs of its layers."""
        runner, spec, start_s = self._runner, self._runner.spec, clock_s(self._runner.device)
        quantization = spec.quantization
        # The first stage reads what it reads in the source, unless it is behind attention with a rounded cache.
        may_drift = bool(self._earlier.weights) or runner.cache.is_rounded
        kind = partial(sum_kind, spec, has_drift=may_drift and quantization.compensates)
        in_halves = quantization.compensation == "auto" and len(self._chunks) > 1
        statistics = StageStatistics(stage, runner.device, self._weights, kind, in_halves)
        inputs = StageInputs(
            runner,
            self._unit,
            stream=_RESULT,
            start=ORIGINAL,
            earlier=self._earlier,
            operands=statistics.operands,
            drifting=statistics.drifting,
            cache_scales=self._largest.scales,
            largest=None if self._earlier.weights else self._largest,
        )
        statistics.add_all_(inputs.of(self._chunks))
        of_sums = statistics.seconds()
        forward_s = clock_s(runner.device) - start_s - sum(of_sums.values())
        add_seconds(self._seconds, {"forward": forward_s, **of_sums})
        return statistics

    def _finished(self, statistics: StageStatistics) -> Iterator[InputStatistics]:
        """Yield what the sums of a stage come to, one input group at a time."""
        device, experts = self._runner.device, self._runner.spec.experts
        with ExitStack() as stack:
            finishing = statistics.finish_(experts, lambda starved: self._all_tokens(starved, stack))
            while True:
                with timed(self._seconds, "hessian", device):
                    finished = next(finishing, None)
                if finished is None:
                    return
                yield finished

    def _all_tokens(self, starved: Sequence[Operand], stack: ExitStack) -> AllTokens:
        """What starved experts would see. Each is run alone later, behind its own earlier layers."""
        runner = self._runner
        if starved:
            stack.enter_context(put_in(runner, self._unit, self._earlier))
        repeats = runner.repeats(_RESULT, self._unit.index, self._largest.scales, ORIGINAL)
        kind, served = partial(sum_kind, runner.spec), runner.served(_RESULT)
        return AllTokens(self._layers, starved, repeats, self._weights.kind, kind, served)
