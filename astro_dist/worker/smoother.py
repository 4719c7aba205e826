"""What a worker does to smooth the inputs of a block: measure channels, find places, decide factors, check them."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from astro.calibration.block_statistics import input_stages
from astro.calibration.channel_statistics import ChannelStatistics, ChannelSums
from astro.calibration.token_weights import group_key
from astro.errors import UnsupportedError
from astro.model.block_call import BlockCall, BlockState, forward, mapped
from astro.model.differences import largest_difference
from astro.model.experts import reads_inputs
from astro.model.operands import Inputs, Operand, is_same_input, names_of
from astro.model.scaling_places import WIDE_BYTES, Place, Trial
from astro.model.smoothed_tensors import Factors, SmoothedInput, exact_factors, plan_changes, producing_layer
from astro.quantization.smoothing import column_statistics, row_factors
from astro.storage.checked_tensors import load_part
from astro.timing import clock_s
from astro_dist.planning.units import BlockUnit
from astro_dist.run_directory.unit_record import SmoothingResult, UnitRecord
from astro_dist.schedule.calls import MeasureChannels, SmoothChannels, SmoothingCall
from astro_dist.schedule.names import CHANNELS, ORIGINAL
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.chunk_pipeline import ChunkPipeline, Passage

__all__ = ["PROBE", "PROBE_TOKENS", "Smoother"]

PROBE = "probe"
"""Name under which it is recorded what blocks are called with for the few tokens that places are tried on."""
PROBE_TOKENS = 32
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5}
"""Largest difference of what a block returns once it is smoothed, relative to the largest value, in dtypes that hold
more than is asked of them: norms of some classes compute in float32 whatever they are given."""
_TOLERANCE_EPS = 4
"""The same in any other dtype, in units of its last place."""
_NO_PLACE = "no norm or linear layer before it can take its factors exactly"
_UNSEEN = "no calibration token reaches it"
_EXPERT = re.compile(r"\.\d+(?=\.[^.]+$)")
"""Number of an expert in the name of its layer."""
_INEXACT = "the block returns something else with it"


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A chunk that passed a block, and what it measured.

    Attributes:
        output: Output of the block.
        sums: Sums of every input by the `_key` of the first operand that reads it.
        seconds: Time that it took.
    """

    output: BlockState
    sums: Mapping[str, ChannelSums]
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A block that is loaded to be tried.

    Attributes:
        trial: What can be done to its channels.
        actions: Forwards of the block, on a few tokens of the calibration text and on random hidden states.
        outputs: What they return while the block is as it is in the source.
        dtype: Dtype of the block.
    """

    trial: Trial
    actions: Sequence[Callable[[], BlockState]]
    outputs: Sequence[BlockState]
    dtype: torch.dtype


class Smoother:
    """Measures the channels of a block's inputs, and decides how they are smoothed."""

    def __init__(self, runner: BlockRunner, pipeline: ChunkPipeline) -> None:
        """Begin with nothing.

        Args:
            runner: Runner of the worker's blocks.
            pipeline: Passes chunks through these blocks.
        """
        self._runner, self._pipeline = runner, pipeline

    def do(self, call: SmoothingCall) -> UnitRecord | None:
        """Do one of the calls that smooth inputs; a record comes of the last one of a block."""
        if isinstance(call, SmoothChannels):
            return self.smooth(call)
        self.measure(call)
        return None

    def measure(self, call: MeasureChannels) -> None:
        """Pass a chunk through a block of the source, and write what it measured at the layers' inputs."""
        passage = Passage(
            (MeasureChannels, call.block),
            lambda chunk: [(ORIGINAL, call.block, chunk)],
            lambda chunk, states: self._pass(call.block, chunk, states[0]),
            lambda chunk, measured: self._save(call.block, chunk, measured),
        )
        self._pipeline.run(passage, call.chunk)

    def _pass(self, block: int, chunk: str, state: BlockState) -> _Measured:
        runner, start = self._runner, clock_s(self._runner.device)
        unit = runner.load_source(block)
        sums: dict[str, ChannelSums] = {}
        last: list[torch.Tensor] = []  # kept alive, so that no other input can take its place in memory

        def note(operand: Operand, inputs: Inputs) -> None:
            X, key = inputs.X, _key(operand)
            if operand.expert is not None or not (last and is_same_input(last[0], X)):
                if key not in sums:
                    sums[key] = ChannelSums(operand.columns, runner.device)
                sums[key].add_(X)
            last[:] = [X]

        with runner.layers(unit).observed(note):
            output = runner.forward(block, state, chunk)
        return _Measured(output, sums, clock_s(runner.device) - start)

    def _save(self, block: int, chunk: str, measured: _Measured) -> None:
        runner, sums = self._runner, measured.sums
        tensors = {f"total.{key}": of_key.total for key, of_key in sums.items()}
        tensors |= {f"maximum.{key}": of_key.maximum for key, of_key in sums.items()}
        note = {"num_tokens": {key: of_key.num_tokens for key, of_key in sums.items()}, "seconds": measured.seconds}
        runner.states.begin_writing(runner.spec.run.hidden(CHANNELS, block + 1, chunk), tensors, json.dumps(note))
        if block + 1 < len(runner.spec.plan.blocks) or runner.spec.token_weights == "loss":
            runner.states.save(ORIGINAL, block + 1, chunk, measured.output)

    def smooth(self, call: SmoothChannels) -> UnitRecord:
        """Decide how the inputs of a block are smoothed, check it, and write the record of that."""
        start, runner = clock_s(self._runner.device), self._runner
        unit = runner.spec.plan.blocks[call.block]
        statistics, measuring_s = self._merged(unit)
        inputs: list[SmoothedInput] = []
        dtype, change = runner.spec.compute_dtype, 0.0
        if unit.linears:
            tensors = runner.spec.checkpoint.read(unit.keys)
            tried = self._tried(unit, tensors)
            dtype = tried.dtype
            inputs = self._decided(unit, tensors, tried, statistics)
            inputs, change = self._checked(unit, tensors, inputs, tried)
        runner.close()
        seconds = {"forward": measuring_s, "smooth": clock_s(runner.device) - start}
        result = SmoothingResult(
            smoothed_inputs=tuple(inputs), checked_in=str(dtype), largest_change=change, seconds=seconds
        )
        return runner.spec.run.finish(call.unit, [], result)

    def _merged(self, unit: BlockUnit) -> tuple[dict[str, ChannelStatistics], float]:
        """The statistics of every input over all calibration chunks by `_key`, and the time of the forwards."""
        run, seconds = self._runner.spec.run, 0.0
        merged: dict[str, ChannelSums] = {}
        for chunk in self._runner.spec.calibration_chunks:
            tensors, text = load_part(run.hidden(CHANNELS, unit.index + 1, chunk))
            note = json.loads(text)
            seconds += note["seconds"]
            for key, count in note["num_tokens"].items():
                total = tensors[f"total.{key}"].to(self._runner.device)
                sums = merged.setdefault(key, ChannelSums(len(total), self._runner.device))
                sums.merge_(total, tensors[f"maximum.{key}"], count)
        return {key: sums.finish() for key, sums in merged.items()}, seconds

    def _tried(self, unit: BlockUnit, tensors: Mapping[str, torch.Tensor]) -> _Trial:
        """Load a block in the widest dtype that it runs in, and run it."""
        dtypes = [torch.float64, torch.float32] if self._fits_wide(unit) else []
        dtypes = [*dtypes, self._runner.spec.compute_dtype]
        for dtype in dict.fromkeys(dtypes):
            try:
                actions = self._actions(unit, tensors, dtype)
                trial = Trial(self._runner.skeleton.blocks[unit.index], actions[0])
                return _Trial(trial, actions, [action() for action in actions], dtype)
            except (RuntimeError, TypeError, ValueError):
                if dtype == dtypes[-1]:
                    raise
        raise AssertionError

    def _fits_wide(self, unit: BlockUnit) -> bool:
        block = self._runner.skeleton.blocks[unit.index]
        return 8 * sum(parameter.numel() for parameter in block.parameters()) <= WIDE_BYTES

    def _actions(
        self, unit: BlockUnit, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> list[Callable[[], BlockState]]:
        """Load a block with some tensors, and return its forwards."""
        runner, index = self._runner, unit.index
        state, call = self._sample(index)
        runner.load_tensors(unit, tensors, dtype)

        def cast(value: object) -> object:
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(dtype) if is_float else value  # type: ignore[attr-defined]

        args, kwargs = mapped((call.args, call.kwargs), cast)
        call = dataclasses.replace(call, args=args, kwargs=kwargs)
        others = {name: mapped(other, cast) for name, other in state.others.items()}
        hidden = state.hidden.to(dtype)
        generator = torch.Generator().manual_seed(index)
        random = torch.randn(hidden.shape, generator=generator).to(hidden.device, dtype)
        random = random * hidden.float().std().to(dtype)
        block = runner.skeleton.blocks[index]
        return [lambda hidden=hidden: forward(block, BlockState(hidden, others), call) for hidden in (hidden, random)]  # type: ignore[misc]

    def _sample(self, index: int) -> tuple[BlockState, BlockCall]:
        """A few tokens of the first chunk before a block; all of them where it gets more than hidden states."""
        runner = self._runner
        chunk = runner.spec.calibration_chunks[0]
        state = runner.states.read(ORIGINAL, index, chunk)
        shape = runner.tokens.shape(chunk)
        if state.others:
            return state, runner.calls.call(index, chunk, shape)
        length = min(PROBE_TOKENS, shape[1])
        return BlockState(state.hidden[:1, :length]), runner.calls.call(index, PROBE, torch.Size((1, length)))

    def _decided(
        self,
        unit: BlockUnit,
        tensors: Mapping[str, torch.Tensor],
        tried: _Trial,
        statistics: Mapping[str, ChannelStatistics],
    ) -> list[SmoothedInput]:
        """How every input of quantized layers is smoothed, before it is checked."""
        prefix, whole = self._prefix(unit), self._whole(unit)
        groups: dict[str, list[Operand]] = {}  # one for all experts that read the same
        for stage in input_stages(self._runner.layers(unit), tried.actions[0]):
            for group in stage:
                groups.setdefault(_key(group[0]), []).extend(group)
        inputs: list[SmoothedInput] = []
        left = dict(groups)
        for place in tried.trial.norms():
            read = {f"{prefix}{reader.parameter}" for reader in place.readers}
            keys = [key for key, group in groups.items() if any(operand.parameter in read for operand in group)]
            if keys:
                inputs.append(self._smoothed(unit, tensors, whole, place, [left.pop(key) for key in keys], statistics))
        producers: dict[str, Place | None] = {}
        for group in left.values():
            parameter = group[0].parameter.removeprefix(prefix)
            if parameter not in producers:
                producers[parameter] = tried.trial.linear(parameter)
            producer = producers[parameter]
            if producer is None:
                inputs.append(SmoothedInput(_names(group), reason=_NO_PLACE))
            else:
                inputs.append(self._smoothed(unit, tensors, whole, producer, [group], statistics))
        return inputs

    def _smoothed(
        self,
        unit: BlockUnit,
        tensors: Mapping[str, torch.Tensor],
        whole: Mapping[str, str],
        place: Place,
        groups: Sequence[Sequence[Operand]],
        statistics: Mapping[str, ChannelStatistics],
    ) -> SmoothedInput:
        """One input with its factors, of which all may be 1; or why it cannot be smoothed."""
        runner, names = self._runner, tuple(name for group in groups for name in _names(group))
        prefix, all_layers = self._prefix(unit), runner.smoothed.layers(unit)
        # Tokens go to several experts or to none; where a layer outside experts reads the same, it sees each once.
        first = min((group[0] for group in groups), key=lambda operand: operand.expert is not None)
        expert = first.expert if place.weight is not None else None
        seen = statistics.get(_key(first))
        if seen is None:
            return SmoothedInput(names, reason=_UNSEEN)
        try:
            changes = plan_changes(place, prefix, all_layers, whole, expert)
        except UnsupportedError as error:
            return SmoothedInput(names, reason=str(error))
        producer = producing_layer(place, prefix, all_layers, expert)
        num_rows, rows = (producer[0].rows, producer[1]) if producer else (place.num_rows, place.rows)
        layers = runner.layers(unit)
        columns = column_statistics([layers.weight(n) for g in groups for operand in g for n in operand.names])
        of_rows = row_factors(runner.spec.activations, seen, columns, rows.to(runner.device), num_rows).cpu()
        for gain, offset in place.gains.items():
            of_rows = exact_factors(of_rows, tensors[whole[f"{prefix}{gain}"]].cpu(), offset)
        into = producer[0].name if producer else f"{prefix}{place.name}"
        return SmoothedInput(names, into, "", changes, Factors.of(of_rows[rows]), Factors.of(of_rows))

    def _checked(
        self, unit: BlockUnit, tensors: Mapping[str, torch.Tensor], inputs: list[SmoothedInput], tried: _Trial
    ) -> tuple[list[SmoothedInput], float]:
        """The inputs whose factors change nothing that the block returns, and the largest difference that is left."""
        tolerance = _TOLERANCE.get(tried.dtype, _TOLERANCE_EPS * torch.finfo(tried.dtype).eps)

        def change_by(some: Iterable[SmoothedInput]) -> float:
            changed = self._runner.smoothed.with_inputs(unit, tensors, list(some))
            self._runner.load_tensors(unit, changed, tried.dtype)
            outputs = [action() for action in tried.actions]
            return max(map(largest_difference, outputs, tried.outputs))

        change = change_by(inputs)
        if change <= tolerance:
            return inputs, change
        kinds: dict[str, list[SmoothedInput]] = {}  # experts are one kind
        for smoothed in inputs:
            kinds.setdefault(_EXPERT.sub("", smoothed.into), []).append(smoothed)
        exact = {kind for kind, members in kinds.items() if not kind or change_by(members) <= tolerance}
        inputs = [
            smoothed if _EXPERT.sub("", smoothed.into) in exact else SmoothedInput(smoothed.layers, reason=_INEXACT)
            for smoothed in inputs
        ]
        change = change_by(inputs)
        if change <= tolerance:
            return inputs, change
        return [SmoothedInput(s.layers, reason=s.reason or _INEXACT) for s in inputs], 0.0

    def _prefix(self, unit: BlockUnit) -> str:
        """Name of a block in the model, with a dot."""
        return f"{self._runner.skeleton.blocks_name}.{unit.index}."

    def _whole(self, unit: BlockUnit) -> dict[str, str]:
        """The checkpoint tensors of a block that hold a parameter as it is, by the parameter's name in the model."""
        skeleton, entries = self._runner.skeleton, self._runner.spec.checkpoint.entries
        targets = {key: skeleton.target_of(key) for key in unit.keys}
        return {
            name: key
            for key, (name, pattern) in targets.items()
            if pattern is None and skeleton.shape_of(name) == entries[key].shape
        }


def _key(operand: Operand) -> str:
    """What names an input: all experts read the same, but each makes for itself what its last layer reads."""
    reads_own = operand.expert is not None and not reads_inputs(operand.parameter)
    return operand.names[0] if reads_own else group_key(operand)


def _names(group: Sequence[Operand]) -> tuple[str, ...]:
    """The names of the layers that read an input; where all experts read it, the parameter that holds them."""
    is_one = group[0].expert is None or not reads_inputs(group[0].parameter)
    return tuple(names_of(group)) if is_one else (group[0].parameter,)
