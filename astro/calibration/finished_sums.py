"""What the sums of input groups come to once all calibration chunks have passed, experts with few tokens included."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from astro.calibration.input_sums import InputSums
from astro.calibration.starved_experts import (
    AllTokens,
    InputStatistics,
    is_starved,
    starved_statistics,
    sufficient_statistics,
)
from astro.calibration.token_weights import TokenWeights
from astro.config import Experts
from astro.model.operands import Operand, names_of

__all__ = ["finish_sums_"]


def finish_sums_(
    sums: dict[tuple[Operand, ...], InputSums],
    experts: Experts,
    weights: TokenWeights,
    all_tokens: Callable[[Sequence[Operand]], AllTokens],
    device: torch.device,
) -> Iterator[InputStatistics]:
    """Yield the statistics of every input group; its sums are forgotten as soon as they are handed out.

    Args:
        sums: Sums of each input group by its operands, in order. Nothing is left of them in the end.
        experts: The policy about experts that saw too few tokens.
        weights: How much each token counts.
        all_tokens: Returns what experts would see if all tokens went through them, given those that saw too few; it is
            called for the policy `all-tokens` alone.
        device: Device of the sums.

    Raises:
        NumericalError: A layer saw no token, or values that are not finite, or an expert saw too few tokens and the
            policy is `fail`.
    """
    starved = [group[0] for group, of_group in sums.items() if is_starved(group[0], of_group.num_tokens, experts)]
    again = all_tokens(starved) if experts.policy == "all-tokens" else None
    shared = _shared(sums, device) if starved and experts.policy == "shared-hessian" else {}
    for group in list(sums):
        of_group, first = sums.pop(group), group[0]
        if first not in starved:
            statistics = sufficient_statistics(names_of(group), of_group)
        else:
            instead = again.sums(first, device) if again else shared.get(first.parameter)
            statistics = starved_statistics(first, of_group.num_tokens, experts, instead, device)
        del of_group
        yield dataclasses.replace(statistics, gradient_energy=weights.energy_of(first))


def _shared(sums: dict[tuple[Operand, ...], InputSums], device: torch.device) -> dict[str, InputSums]:
    """The sums over all experts of each parameter, by the parameter's name."""
    shared: dict[str, InputSums] = {}
    for (first, *_), of_group in sums.items():
        if first.expert is not None:
            empty = InputSums(first.columns, device, of_group.kind, of_group.token_weights)
            shared.setdefault(first.parameter, empty).absorb_(of_group)
    return shared
