"""The statistics of a block's layers: which of them read the same input, and the Hessians of those inputs.

Layers that read the same input are an input group: q, k and v; gate and up. Shapes: T tokens, C columns.
"""

import contextlib
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from astro.activation_config import ActivationScheme
from astro.calibration.finished_sums import finish_sums_
from astro.calibration.input_sums import InputSums, SumKind, as_they_are
from astro.calibration.starved_experts import AllTokens, InputStatistics
from astro.calibration.token_weights import TokenWeights
from astro.config import Experts
from astro.errors import NumericalError, UnsupportedError
from astro.model.activations import BlockLayers
from astro.model.operands import Inputs, Operand, is_same_input, share_input
from astro.timing import Stopwatch

__all__ = ["BlockStatistics", "input_stages", "inputs_of"]

Output = TypeVar("Output")


class BlockStatistics:
    """Collects the Hessians of a block's layers while its forward runs.

    Layers that are called one after the other with the very same input share one Hessian, unless each of them rounds it
    with learned clips of its own. The first forward shows which layers these are, and every later one is checked
    against it. Gate and up of one expert are always one input group.

    Attributes:
        input_groups: Operands of each input group, in the order of the first forward; experts one after the other.
        stopwatch: Time that the products took, and rounding the inputs for them.
    """

    def __init__(
        self,
        layers: BlockLayers,
        device: torch.device,
        weights: TokenWeights,
        sum_kind: Callable[[Operand], SumKind] = as_they_are,
        served: ActivationScheme | None = None,
    ) -> None:
        """Begin with no statistics.

        Args:
            layers: The layers of the block, which is loaded.
            device: Device of the sums.
            weights: How much each token counts.
            sum_kind: Returns what is summed of an operand's inputs, but for a drift from the source.
            served: Kind of grid to which the forwards round the inputs of layers; None in the source model.
        """
        self._layers, self._weights, self._chunk = layers, weights, ""
        self._device, self._sum_kind, self._served = device, sum_kind, served
        self._sums: list[InputSums] = []
        self._input_group_of: dict[Operand, int] = {}
        self._last: tuple[torch.Tensor, Operand, int] | None = None
        self.input_groups: list[list[Operand]] = []
        self.stopwatch = Stopwatch(device)

    def run(self, action: Callable[[], Output], chunk: str) -> Output:
        """Run a forward of the block, add the inputs of its layers, and return its result.

        Args:
            action: A forward of the block.
            chunk: Name of the calibration chunk that it is fed with.
        """
        self._chunk = chunk
        try:
            with self._layers.observed(self._observe):
                return action()
        finally:
            self._last = None

    def finish_(self, experts: Experts, repeats: Sequence[Callable[[], object]]) -> Iterator[InputStatistics]:
        """Yield the statistics of every input group; each is forgotten as soon as it is handed out.

        Args:
            experts: The policy about experts that saw too few tokens.
            repeats: A forward of the block for every calibration chunk; the policy `all-tokens` runs them once more.

        Raises:
            NumericalError: A layer was never reached, or saw values that are not finite, or an expert saw too few
                tokens and the policy is `fail`.
        """
        _require_reached(self._layers.operands, self._input_group_of)
        groups = dict(zip(map(tuple, self.input_groups), self._sums, strict=True))
        self._sums = []

        def all_tokens(starved: Sequence[Operand]) -> AllTokens:
            return AllTokens(self._layers, starved, repeats, self._weights.kind, self._sum_kind, self._served)

        yield from finish_sums_(groups, experts, self._weights, all_tokens, self._device)

    def _observe(self, operand: Operand, inputs: Inputs) -> None:
        X = inputs.X
        shares, last_index = False, -1
        if self._last is not None and operand.expert is None:
            last_X, last, last_index = self._last
            shares = share_input(operand, X, last, last_X)
        if operand not in self._input_group_of:
            self._open(operand, last_index if shares else None)
        index = self._input_group_of[operand]
        if operand is self.input_groups[index][0]:
            with self.stopwatch.running():
                weights = self._weights.of(operand, self._chunk, inputs)
                self._sums[index].add_(X, weights)
        elif not shares or last_index != index:
            first, other = self.input_groups[index][0].names[0], operand.names[0]
            raise UnsupportedError(f"{other} shared its input with {first} in one forward, not in another")
        self._last = (X, operand, index)

    def _open(self, operand: Operand, index: int | None) -> None:
        """Put an operand that was not seen before into an input group, or into a new one where `index` is None."""
        if index is not None:
            self.input_groups[index].append(operand)
            self._input_group_of[operand] = index
            return
        for member in _together(self._layers, operand):
            self._input_group_of[member] = len(self.input_groups)
            self.input_groups.append([member])
            self._sums.append(self._empty(member, keep_inputs=member.expert is not None))

    def _empty(self, operand: Operand, keep_inputs: bool = False) -> InputSums:
        kind, token_weights = self._sum_kind(operand), self._weights.kind_of(operand)
        return InputSums(operand.columns, self._device, kind, token_weights, keep_inputs)


class _Reached(Exception):
    """Ends a forward that is only wanted up to some layer."""


def _together(layers: BlockLayers, operand: Operand) -> list[Operand]:
    """Return the operands that are handled together: an operand alone, or the same layers of all experts."""
    if operand.expert is None:
        return [operand]
    return [other for other in layers.operands if other.parameter == operand.parameter]


def input_stages(layers: BlockLayers, action: Callable[[], object]) -> list[list[list[Operand]]]:
    """Return the input groups of a block, in the order in which a forward comes to them.

    Input groups whose inputs are known at the same time are in one stage: a single input group outside experts, several
    where layers round one input each with learned clips of its own, and those of all experts that read the same
    parameter.

    Args:
        layers: The layers of the block, which is loaded.
        action: A forward of the block.

    Returns:
        Stages of input groups of operands.

    Raises:
        NumericalError: The forward does not reach a layer.
    """
    stages: list[list[list[Operand]]] = []
    seen: set[Operand] = set()
    last: list[tuple[Operand, torch.Tensor]] = []  # kept alive, so that no other input can take its place in memory

    def note(operand: Operand, inputs: Inputs) -> None:
        X = inputs.X
        if operand not in seen and operand.expert is None and last and is_same_input(last[0][1], X):
            if share_input(operand, X, *last[0]):
                stages[-1][-1].append(operand)
            else:
                stages[-1].append([operand])
            seen.add(operand)
        elif operand not in seen:
            members = _together(layers, operand)
            stages.append([[member] for member in members])
            seen.update(members)
        last[:] = [(operand, X)]

    with layers.observed(note):
        action()
    _require_reached(layers.operands, seen)
    return stages


def inputs_of(
    layers: BlockLayers,
    operands: Collection[Operand],
    action: Callable[[], object],
    is_enough: Callable[[], bool] | None = None,
) -> dict[Operand, Inputs]:
    """Return the inputs of some operands in a forward, which ends as soon as all of them are known.

    Args:
        layers: The layers of the block, which is loaded.
        operands: The operands; experts among them that no token reaches are left out of the result.
        action: A forward of the block.
        is_enough: A function that tells whether the forward has shown all else that somebody waits for; None where
            nobody does.

    Raises:
        NumericalError: The forward does not reach an operand outside experts.
    """
    seen: dict[Operand, Inputs] = {}

    def note(operand: Operand, inputs: Inputs) -> None:
        if operand in operands:
            seen[operand] = inputs
        if len(seen) == len(operands) and (is_enough is None or is_enough()):
            raise _Reached

    with contextlib.suppress(_Reached), layers.observed(note):
        action()
    for operand in operands:
        if operand not in seen and operand.expert is None:
            raise NumericalError(
                f"{operand.names[0]}: reached by some calibration chunks, not by all; use longer sequences"
            )
    return seen


def _require_reached(operands: Iterable[Operand], reached: Container[Operand]) -> None:
    unreached = [operand.names[0] for operand in operands if operand not in reached]
    if unreached:
        raise NumericalError(
            f"{unreached[0]}: no calibration token reached this layer; use more calibration text, or, where its block "
            "multiplies with it in a way that is not seen here, name it in quantization.ignore"
        )
