"""The statistics of a block's layers: which of them share an input, and the Hessians of those inputs.

Shapes: T tokens, C columns.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence

import torch

from astro.calibration.hessian import HessianAccumulator
from astro.calibration.starved_experts import AllTokens, GroupStatistics, is_starved, starved_statistics
from astro.config import Experts
from astro.errors import NumericalError, UnsupportedError
from astro.model.activations import BlockLayers, Operand, names_of

__all__ = ["BlockStatistics", "input_stages", "inputs_of"]


class BlockStatistics:
    """Collects the Hessians of a block's layers while its forward runs.

    Layers that are called one after the other with the very same input share one Hessian: q, k and v; gate and up.
    Which do is found in the first forward and checked in every later one. Gate and up of one expert share theirs too.

    Attributes:
        groups: operands that share an input, in the order of the first forward; all experts one after the other.
        seconds: time spent on the products.
    """

    def __init__(self, layers: BlockLayers, device: torch.device) -> None:
        self._layers = layers
        self._device = device
        self._accumulators: list[HessianAccumulator] = []
        self._group_of: dict[Operand, int] = {}
        self._last: tuple[torch.Tensor, int] | None = None
        self.groups: list[list[Operand]] = []
        self.seconds = 0.0

    def run(self, action: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a forward of the block under observation and return its result."""
        try:
            with self._layers.observed(self._observe):
                return action()
        finally:
            self._last = None

    def finish_(self, experts: Experts, repeats: Sequence[Callable[[], object]]) -> Iterator[GroupStatistics]:
        """Every group, handed out once and then forgotten.

        Args:
            experts: what is done about experts that saw too few tokens.
            repeats: a forward of the block for every calibration chunk, should they have to pass once more.

        Raises:
            NumericalError: a layer was never reached, or saw values that are not finite, or an expert saw too few
                tokens and the policy is to fail.
        """
        _require_reached(self._layers.operands, self._group_of)
        accumulators, self._accumulators = self._accumulators, []
        few = [
            group[0]
            for group, sums in zip(self.groups, accumulators, strict=True)
            if is_starved(group[0], sums.num_tokens, experts)
        ]
        again = AllTokens(self._layers, few, repeats) if experts.policy == "all-tokens" else None
        shared = self._shared(accumulators) if few and experts.policy == "shared-hessian" else {}
        for group, sums in zip(self.groups, accumulators, strict=True):
            names = tuple(names_of(group))
            if group[0] not in few:
                H = sums.finish_("+".join(names))
                yield GroupStatistics(names, H, sums.num_tokens, sums.num_tokens)
            else:
                instead = again.sums(group[0], self._device) if again else shared.get(group[0].parameter)
                yield starved_statistics(group[0], sums.num_tokens, experts, instead, self._device)

    def _shared(self, accumulators: Sequence[HessianAccumulator]) -> dict[str, HessianAccumulator]:
        """Sums over all experts of a parameter, by its name."""
        shared: dict[str, HessianAccumulator] = {}
        for group, sums in zip(self.groups, accumulators, strict=True):
            if group[0].expert is not None:
                own = HessianAccumulator(group[0].columns, self._device)
                shared.setdefault(group[0].parameter, own).absorb_(sums)
        return shared

    def _observe(self, operand: Operand, X: torch.Tensor) -> None:
        last, group = self._last if self._last is not None else (None, -1)
        shares = operand.expert is None and last is not None and _is_same(last, X)
        if operand not in self._group_of:
            self._open(operand, group if shares else None)
        own = self._group_of[operand]
        if operand is self.groups[own][0]:
            start = time.perf_counter()
            self._accumulators[own].add_(X)
            self.seconds += time.perf_counter() - start
        elif not shares or group != own:
            first, other = self.groups[own][0].names[0], operand.names[0]
            raise UnsupportedError(f"{other} shared its input with {first} in one forward, not in another")
        self._last = (X, own)

    def _open(self, operand: Operand, group: int | None) -> None:
        if group is not None:
            self.groups[group].append(operand)
            self._group_of[operand] = group
            return
        for member in _together(self._layers, operand):
            self._group_of[member] = len(self.groups)
            self.groups.append([member])
            self._accumulators.append(HessianAccumulator(member.columns, self._device, member.expert is not None))


class _Reached(Exception):
    """Ends a forward that is only wanted up to some layer."""


def _together(layers: BlockLayers, operand: Operand) -> list[Operand]:
    """What comes to its turn together: an operand alone, or the same layers of all experts."""
    if operand.expert is None:
        return [operand]
    return [other for other in layers.operands if other.parameter == operand.parameter]


def input_stages(layers: BlockLayers, action: Callable[[], object]) -> list[list[list[Operand]]]:
    """Stages of a block in the order in which a forward comes to them, each of groups of operands with one input.

    A stage is one group, or as many as there are experts.

    Args:
        layers: of the block.
        action: a forward of the block.

    Raises:
        NumericalError: the forward does not reach a layer.
    """
    stages: list[list[list[Operand]]] = []
    seen: set[Operand] = set()
    last: list[torch.Tensor] = []  # kept, so that no other input can take its place in memory

    def note(operand: Operand, X: torch.Tensor) -> None:
        if operand not in seen and operand.expert is None and last and _is_same(last[0], X):
            stages[-1][0].append(operand)
            seen.add(operand)
        elif operand not in seen:
            members = _together(layers, operand)
            stages.append([[member] for member in members])
            seen.update(members)
        last[:] = [X]

    with layers.observed(note):
        action()
    _require_reached(layers.operands, seen)
    return stages


def inputs_of(
    layers: BlockLayers, operands: Collection[Operand], action: Callable[[], object]
) -> dict[Operand, torch.Tensor]:
    """The inputs [..., C] of some operands in a forward, which goes no further than it must.

    Args:
        layers: of the block.
        operands: which of them; experts that no token reaches stay away from the result.
        action: a forward of the block.

    Raises:
        NumericalError: the forward does not reach an operand outside experts.
    """
    seen: dict[Operand, torch.Tensor] = {}

    def note(operand: Operand, X: torch.Tensor) -> None:
        if operand in operands:
            seen[operand] = X
        if len(seen) == len(operands):
            raise _Reached

    with contextlib.suppress(_Reached), layers.observed(note):
        action()
    for operand in operands:
        if operand not in seen and operand.expert is None:
            raise NumericalError(
                f"{operand.names[0]}: reached by some calibration chunks, not by all; use longer sequences"
            )
    return seen


def _is_same(X: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two inputs, both still alive, are one."""
    return X.data_ptr() == other.data_ptr() and X.shape == other.shape


def _require_reached(operands: Iterable[Operand], reached: Container[Operand]) -> None:
    unreached = [operand.names[0] for operand in operands if operand not in reached]
    if unreached:
        raise NumericalError(
            f"{unreached[0]}: no calibration token reached this layer; use more calibration text, or, where its block "
            "multiplies with it in a way that is not seen here, name it in quantization.ignore"
        )
