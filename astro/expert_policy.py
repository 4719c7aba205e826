"""What takes the place of the statistics of an expert that too few calibration tokens reached.

Shapes: T tokens, C columns.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from astro.config import Experts, Quantization, Regularizer
from astro.errors import NumericalError
from astro.experts import call_alone
from astro.hessian import HessianAccumulator
from astro.observation import BlockLayers, Operand

__all__ = ["GroupStatistics", "feed_all_tokens", "is_starved", "rounded", "starved_statistics"]


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


def feed_all_tokens(
    layers: BlockLayers, operands: Sequence[Operand], repeats: Iterable[Callable[[], object]], device: torch.device
) -> dict[str, HessianAccumulator]:
    """Sums of the inputs of some experts' layers if every token went through each of these experts.

    Args:
        layers: of the block.
        operands: of experts.
        repeats: a forward of the block for every calibration chunk.
        device: where the sums are kept.

    Returns:
        By name of the first layer of an operand.
    """
    sums = {operand: HessianAccumulator(operand.columns, device) for operand in operands}
    experts: dict[torch.nn.Module, set[int]] = {}
    for operand in operands:
        experts.setdefault(layers.module_of(operand), set()).add(operand.expert or 0)
    owners = {layers.module_of(operand): layers.owner_of(operand) for operand in operands}
    given: dict[torch.nn.Module, tuple[Any, Any]] = {}

    def note_call(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        given[module] = (args, kwargs)

    def note_input(operand: Operand, X: torch.Tensor) -> None:
        if operand in sums:
            sums[operand].add_(X)

    for repeat in repeats if operands else ():
        handles = [
            module.register_forward_pre_hook(note_call, with_kwargs=True) for pair in owners.items() for module in pair
        ]
        try:
            repeat()
        finally:
            for handle in handles:
                handle.remove()
        with layers.observed(note_input):
            for module, own in experts.items():
                args, kwargs = given[owners[module]]
                X = args[0] if args else kwargs["hidden_states"]
                for expert in sorted(own):
                    call_alone(module, *given[module], X, expert)
    return {operand.names[0]: own for operand, own in sums.items()}


def is_starved(operand: Operand, num_tokens: int, experts: Experts) -> bool:
    """Whether an operand is of an expert that saw fewer tokens than it should."""
    return operand.expert is not None and num_tokens < experts.min_tokens


def starved_statistics(
    operand: Operand,
    routed_tokens: int,
    experts: Experts,
    sums: Mapping[str, HessianAccumulator],
    device: torch.device,
) -> GroupStatistics:
    """What takes the place of an expert's own statistics.

    Args:
        operand: of an expert that saw too few tokens.
        routed_tokens: that it saw.
        experts: the policy.
        sums: over all tokens, by name of the operand's first layer; over all experts, by name of the parameter.
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
    key = operand.names[0] if experts.policy == "all-tokens" else operand.parameter
    # Of sums that several experts share none may be used up.
    own = HessianAccumulator(operand.columns, device)
    own.merge_(sums[key].partial, sums[key].num_tokens)
    return GroupStatistics(operand.names, own.finish_(name), own.num_tokens, routed_tokens, experts.policy)


def rounded(quantization: Quantization, regularization: Regularizer) -> tuple[Quantization, Regularizer]:
    """The settings of layers that are rounded to nearest, without statistics."""
    return dataclasses.replace(quantization, method="rtn"), dataclasses.replace(regularization, name="none")
