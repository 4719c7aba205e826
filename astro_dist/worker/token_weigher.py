"""What a worker does to weigh the calibration tokens by the loss, before a run in any mode.

The gradient of the loss passes back through the source's blocks. In each block it leaves the energy of every token at
every input group, chunk by chunk; once all chunks have passed, these become weights.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

import torch

from astro.calibration.backward import pass_back
from astro.calibration.token_weights import (
    OUTPUT,
    TokenWeights,
    effective_tokens,
    loss_weights,
    output_energy,
    typical_energy,
)
from astro.errors import UnsupportedError
from astro.model.block_call import BlockState
from astro.model.perplexity import gradient_scale, loss_gradient
from astro.storage.checked_tensors import load_part, save_part
from astro.timing import Stopwatch
from astro_dist.planning.units import BlockUnit
from astro_dist.run_directory.unit_record import UnitRecord, WeightsResult
from astro_dist.schedule.calls import Backward, DifferentiateLoss, LoadWeights, WeighingCall, WeighTokens
from astro_dist.schedule.names import ENERGY, GRADIENT, ORIGINAL
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.chunk_pipeline import ChunkPipeline, Passage

__all__ = ["TokenWeigher", "read_token_weights"]

_TOKENS, _EXPERT, _TYPICAL = "tokens", "expert", "typical"
"""What the names of tensors begin with: the energy of every token at an input group, that of the tokens of an expert at
it alone, and the energy of all tokens together at either."""


@dataclasses.dataclass(frozen=True)
class _PassedBack:
    """What came of a chunk's gradient on its way back through a block.

    Attributes:
        gradient: Gradient of the loss with respect to the block's input; empty where none passes.
        energies: Energies by kind and name of the layer or the input group.
        reason: Why nothing was measured; empty where it was.
        watch: Time that it took, which is read when the chunk is written: the next one may be passed back by then.
    """

    gradient: BlockState
    energies: dict[str, torch.Tensor]
    reason: str
    watch: Stopwatch


class TokenWeigher:
    """Takes the gradient of the loss back through blocks, and turns what it measured into weights."""

    def __init__(self, runner: BlockRunner, pipeline: ChunkPipeline) -> None:
        """Begin with nothing.

        Args:
            runner: Runner of the worker's blocks.
            pipeline: Passes chunks through these blocks.
        """
        self._runner, self._pipeline = runner, pipeline

    def do(self, call: WeighingCall) -> UnitRecord | None:
        """Do one of the calls that measure token weights; a record comes of the last one of a block."""
        match call:
            case LoadWeights(None):
                self._runner.load_outside()
            case LoadWeights(int(block)):
                self._runner.load(ORIGINAL, block)
            case DifferentiateLoss():
                self.differentiate_loss(call)
            case Backward():
                self.backward(call)
            case WeighTokens():
                return self.weigh(call)
        return None

    def differentiate_loss(self, call: DifferentiateLoss) -> None:
        """Write the gradient of one chunk's loss with respect to the last block's output."""
        runner, last = self._runner, len(self._runner.spec.plan.blocks)
        runner.load_outside()
        runner.expect_following(call)

        def compute(chunk: str, states: Sequence[BlockState]) -> BlockState:
            tokens, num_leading = runner.tokens, runner.spec.num_leading
            num_outputs = runner.calls.recording(tokens.shape(chunk)).num_outputs
            ids = tokens.input_ids(chunk)
            return BlockState(loss_gradient(runner.skeleton, ids, states[0].hidden, num_outputs, num_leading))

        passage = Passage(
            (DifferentiateLoss,),
            lambda chunk: [(ORIGINAL, last, chunk)],
            compute,
            lambda chunk, gradient: runner.states.save(GRADIENT, last, chunk, gradient),
        )
        self._pipeline.run(passage, call.chunk)

    def backward(self, call: Backward) -> None:
        """Take one chunk's gradient back through a block, and write what it measured there.

        Where no gradient passes through a block, an empty one is handed on; the blocks before it measure nothing.
        """
        block = call.block
        passage = Passage(
            (Backward, block),
            lambda chunk: [(ORIGINAL, block, chunk), (GRADIENT, block + 1, chunk)],
            lambda chunk, states: self._pass_back(call, chunk, states),
            lambda chunk, passed: self._save(block, chunk, passed),
        )
        self._pipeline.run(passage, call.chunk)

    def _pass_back(self, call: Backward, chunk: str, states: Sequence[BlockState]) -> _PassedBack:
        """Pass a gradient back: of the call's own chunk, or of the one behind it."""
        runner, watch = self._runner, Stopwatch(self._runner.device)
        block, (state, gradient) = call.block, states
        energies: dict[str, torch.Tensor] = {}
        reason = "no gradient passes through a block behind it"
        if gradient.hidden.numel():
            unit, reason = runner.load(ORIGINAL, block), ""
            runner.expect_following(call)
            if runner.spec.quantization.tune_steps:  # known whether or not a gradient passes through the block
                energies[f"{_TOKENS}.{OUTPUT}"] = output_energy(gradient.hidden)
            try:
                with watch.running():
                    passed = pass_back(
                        runner.layers(unit), lambda before: runner.forward(block, before, chunk), state, gradient
                    )
                gradient = passed.gradient
                energies |= {f"{_TOKENS}.{key}": energy for key, energy in passed.energies.items()}
                energies |= {f"{_EXPERT}.{name}": energy for name, energy in passed.of_experts.items()}
            except UnsupportedError as error:
                gradient, reason = BlockState(gradient.hidden.new_empty(0)), str(error)
        return _PassedBack(gradient, energies, reason, watch)

    def _save(self, block: int, chunk: str, passed: _PassedBack) -> None:
        runner, note = self._runner, json.dumps({"reason": passed.reason, "seconds": passed.watch.read_s()})
        runner.states.begin_writing(runner.spec.run.hidden(ENERGY, block + 1, chunk), passed.energies, note)
        if block:
            runner.states.save(GRADIENT, block, chunk, passed.gradient)

    def weigh(self, call: WeighTokens) -> UnitRecord:
        """Write the weights of all tokens at a block's input groups, and the record of that."""
        run, device = self._runner.spec.run, self._runner.device
        chunks = self._runner.spec.calibration_chunks
        parts = {chunk: load_part(run.hidden(ENERGY, call.block + 1, chunk)) for chunk in chunks}
        notes = [json.loads(note) for _, note in parts.values()]
        reason = next((note["reason"] for note in notes if note["reason"]), "")
        weights: dict[str, torch.Tensor] = {}
        effective: dict[str, float] = {}
        measured = set.intersection(*(_named(_TOKENS, tensors) for tensors, _ in parts.values()))
        experts = {
            linear.parameter
            for linear in self._runner.spec.plan.blocks[call.block].linears
            if linear.expert is not None
        }
        if not reason and not experts <= measured:
            reason = "it cannot be seen which tokens its experts are given"
        for name in sorted(measured):
            energies = [parts[chunk][0][f"{_TOKENS}.{name}"].to(device) for chunk in chunks]
            of_tokens = loss_weights(torch.cat(energies))
            if of_tokens is None and name == OUTPUT:
                continue  # its tokens are weighted by their norm, and no input group's are
            if of_tokens is None:
                reason = "the gradient is zero or not finite"
                continue
            if name != OUTPUT:
                effective[name] = effective_tokens(of_tokens)
            pieces = of_tokens.split([len(energy) for energy in energies])
            weights |= {f"{chunk}.{name}": piece for chunk, piece in zip(chunks, pieces, strict=True)}
        weights |= self._typical_energies([tensors for tensors, _ in parts.values()], chunks)
        path = run.token_weights(call.block)
        save_part(path, weights)
        result = WeightsResult(
            effective_tokens=effective, reason=reason, seconds={"backward": sum(note["seconds"] for note in notes)}
        )
        return run.finish(call.unit, [path], result)

    def _typical_energies(
        self, parts: Iterable[Mapping[str, torch.Tensor]], chunks: Iterable[str]
    ) -> dict[str, torch.Tensor]:
        """The energy of all tokens together at every input group, and at every expert alone, float64 []."""
        energies: dict[str, list[torch.Tensor]] = {}
        for tensors in parts:
            for key, energy in tensors.items():
                energies.setdefault(f"{_TYPICAL}.{key.partition('.')[2]}", []).append(energy)
        num_tokens = sum(self._runner.tokens.input_ids(chunk).numel() for chunk in chunks)
        scale = gradient_scale(self._runner.spec.compute_dtype) ** 2
        typical = {name: typical_energy(pieces, num_tokens) / scale for name, pieces in energies.items()}
        return {name: torch.tensor(energy, dtype=torch.float64) for name, energy in typical.items()}


def _named(kind: str, tensors: Iterable[str]) -> set[str]:
    """Return the names of which a part holds an energy of some kind."""
    return {name.partition(".")[2] for name in tensors if name.partition(".")[0] == kind}


def read_token_weights(runner: BlockRunner, unit: BlockUnit) -> TokenWeights:
    """Return the weights of the calibration tokens at a block's layers, as the configuration asks for them.

    Args:
        runner: Runner of the worker's blocks.
        unit: Unit of the block.

    Raises:
        DamagedError: The file of the weights is missing, or not as it was written.
    """
    kind = runner.spec.token_weights
    if kind != "loss":
        return TokenWeights(kind)
    tensors, _ = load_part(runner.spec.run.token_weights(unit.index))
    weights: dict[tuple[str, str], torch.Tensor] = {}
    energies: dict[str, float] = {}
    for name, tensor in tensors.items():
        chunk, _, key = name.partition(".")
        if chunk == _TYPICAL:
            energies[key] = float(tensor)
        else:
            weights[chunk, key] = tensor.to(runner.device)
    return TokenWeights(kind, weights, energies)
