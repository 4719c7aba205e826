"""What takes the place of the statistics of an expert that too few calibration tokens reached.

Shapes: T tokens, C columns.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from astro.calibration.hessian import HessianAccumulator
from astro.config import Experts
from astro.errors import NumericalError
from astro.model.activations import BlockLayers, Operand
from astro.model.experts import call_alone, reads_inputs

__all__ = ["AllTokens", "GroupStatistics", "exhaust", "is_starved", "starved_statistics"]


@dataclasses.dataclass(frozen=True)
class GroupStatistics:
    """What is known of the inputs of a group.

    Attributes:
        names: of the layers that share the input.
        H: mean of xxᵀ, float32 [C, C]; the identity where the group is to be rounded to nearest.
        num_tokens: in H.
        routed_tokens: that the model itself sends through these layers.
        fallback: the experts' policy where it had to be used, else empty.
    """

    names: tuple[str, ...]
    H: torch.Tensor
    num_tokens: int
    routed_tokens: int
    fallback: str = ""


def exhaust(statistics: Iterator[GroupStatistics]) -> None:
    """Let statistics that were all taken come to their end: what they were made from is let go, and where there was no
    group they see that none should have been.

    Args:
        statistics: nothing is left of them.
    """
    left = next(statistics, None)
    if left is not None:
        raise AssertionError(f"statistics of {left.names} belong to no group")


class AllTokens:
    """What experts would see if every token went through each of them.

    The inputs of their layer are kept for all calibration tokens, so that experts can be asked for one after the other.
    """

    def __init__(
        self,
        layers: BlockLayers,
        operands: Sequence[Operand],
        repeats: Iterable[Callable[[], object]],
    ) -> None:
        """Run the block once more.

        Args:
            layers: of the block.
            operands: of the experts that will be asked for.
            repeats: a forward of the block for every calibration chunk.
        """
        self._layers = layers
        self._shared: dict[str, HessianAccumulator] = {}
        modules = {layers.module_of(operand): layers.owner_of(operand) for operand in operands}
        self._calls: dict[nn.Module, list[tuple[Any, Any, torch.Tensor]]] = {module: [] for module in modules}
        given: dict[nn.Module, tuple[Any, Any]] = {}

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            given[module] = (args, kwargs)

        handles = [
            module.register_forward_pre_hook(note, with_kwargs=True) for pair in modules.items() for module in pair
        ]
        try:
            for repeat in repeats if operands else ():
                repeat()
                for module, owner in modules.items():
                    args, kwargs = given[owner]
                    self._calls[module].append((*given[module], args[0] if args else kwargs["hidden_states"]))
        finally:
            for handle in handles:
                handle.remove()

    def sums(self, operand: Operand, device: torch.device) -> HessianAccumulator:
        """Of the inputs of one expert's layers. Of those that read what the experts are given it is one for all."""
        if operand.parameter in self._shared:
            return self._shared[operand.parameter]
        sums = HessianAccumulator(operand.columns, device)

        def note(seen: Operand, X: torch.Tensor) -> None:
            if seen == operand:
                sums.add_(X)

        module = self._layers.module_of(operand)
        with self._layers.observed(note):
            for args, kwargs, X in self._calls[module]:
                call_alone(module, args, kwargs, X, operand.expert or 0)
        if reads_inputs(operand.parameter):
            self._shared[operand.parameter] = sums
        return sums


def is_starved(operand: Operand, num_tokens: int, experts: Experts) -> bool:
    """Whether an operand is of an expert that saw fewer tokens than it should."""
    return operand.expert is not None and num_tokens < experts.min_tokens


def starved_statistics(
    operand: Operand,
    routed_tokens: int,
    experts: Experts,
    sums: HessianAccumulator | None,
    device: torch.device,
) -> GroupStatistics:
    """What takes the place of an expert's own statistics.

    Args:
        operand: of an expert that saw too few tokens.
        routed_tokens: that it saw.
        experts: the policy.
        sums: over all tokens, or over all experts, as the policy says; None where it wants none.
        device: of the result.

    Raises:
        NumericalError: the policy is to fail.
    """
    name = "+".join(operand.names)
    if experts.policy == "fail":
        raise NumericalError(
            f"{name}: {routed_tokens} calibration tokens reached this expert, experts.min_tokens is "
            f"{experts.min_tokens}; use more calibration text, or another experts.policy"
        )
    if experts.policy == "rtn":
        H = torch.eye(operand.columns, dtype=torch.float32, device=device)
        return GroupStatistics(operand.names, H, 0, routed_tokens, experts.policy)
    assert sums is not None
    # Of sums that several experts share none may be used up.
    own = HessianAccumulator(operand.columns, device)
    own.absorb_(sums)
    return GroupStatistics(operand.names, own.finish_(name), own.num_tokens, routed_tokens, experts.policy)
