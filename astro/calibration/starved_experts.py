"""The statistics of a layer's inputs, and what replaces them for an expert that too few calibration tokens reached.

Layers that read the same input are an input group: q, k and v; gate and up. Shapes: T tokens, C columns.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from astro.activation_config import ActivationScheme
from astro.calibration.input_sums import InputSums, RoundingMoments, SumKind, as_they_are
from astro.calibration.token_weights import Kind, norm_weights
from astro.config import Experts
from astro.errors import NumericalError
from astro.model.activations import BlockLayers
from astro.model.experts import call_alone, reads_inputs
from astro.model.operands import Inputs, Operand
from astro.model.rounded_inputs import rounded_inputs

__all__ = ["AllTokens", "InputStatistics", "exhaust", "is_starved", "starved_statistics", "sufficient_statistics"]


@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """What calibration learned of the inputs that an input group reads.

    Attributes:
        names: Names of the layers that read the input.
        H: Weighted mean of x̂x̂ᵀ over the tokens, float32 [C, C]; the identity where the layers are to be rounded to
            nearest. Where inputs stay as they are, x̂ is x.
        num_tokens: Number of tokens that H was made from.
        routed_tokens: Number of calibration tokens that the model itself sends through these layers.
        token_weights: What the tokens are weighted by.
        gradient_energy: Energy of the loss's gradient at the layers' outputs, see `typical_energy`; None where it was
            not measured.
        fallback: The experts' policy, where too few tokens made it necessary; empty elsewhere.
        drift: Weighted mean of (x_s − x)x̂ᵀ, x_s being the inputs in the source model, float32 [C, C]; None where
            weights do not make up for errors before them.
        rounding: What was learned of how the inputs are rounded; None where nothing was, or they stay as they are.
        spread: How far the drifts over two halves of the tokens lie apart, float32 [C, C] in the memory of the machine,
            see `InputSums.spread_`; None where they are not told apart.
    """

    names: tuple[str, ...]
    H: torch.Tensor
    num_tokens: int
    routed_tokens: int
    token_weights: Kind
    gradient_energy: float | None = None
    fallback: str = ""
    drift: torch.Tensor | None = None
    rounding: RoundingMoments | None = None
    spread: torch.Tensor | None = None


def exhaust(statistics: Iterator[InputStatistics]) -> None:
    """Run an iterator of statistics to its end, so that it frees what it made them from.

    Args:
        statistics: An iterator of which every item was taken already.

    Raises:
        AssertionError: An item is left, which belongs to no input group.
    """
    left = next(statistics, None)
    if left is not None:
        raise AssertionError(f"statistics of {left.names} belong to no group")


class AllTokens:
    """The inputs that experts would see if every token went through each of them.

    What goes into their mixture of experts is kept for all calibration tokens, to be sent through one expert after the
    other.
    """

    def __init__(
        self,
        layers: BlockLayers,
        operands: Sequence[Operand],
        repeats: Iterable[Callable[[], object]],
        token_weights: Kind,
        sum_kind: Callable[[Operand], SumKind] = as_they_are,
        served: ActivationScheme | None = None,
    ) -> None:
        """Run the block once more over the calibration chunks and keep what its experts are called with.

        Args:
            layers: The layers of the block.
            operands: Operands of the experts that `sums` will be asked for.
            repeats: A forward of the block for every calibration chunk.
            token_weights: What tokens are weighted by elsewhere. Here their norm weighs them, since the loss says
                nothing of an expert that it does not depend on; with `none` they all count alike.
            sum_kind: Returns what is summed of an operand's inputs.
            served: Kind of grid to which the inputs of layers are rounded in these forwards; None in the source model.
        """
        self._layers = layers
        self._token_weights: Kind = "norm" if token_weights == "loss" else token_weights
        self._sum_kind, self._served = sum_kind, served
        self._shared: dict[str, InputSums] = {}
        modules = {layers.module_of(operand): layers.owner_of(operand) for operand in operands}
        self._calls: dict[nn.Module, list[tuple[Any, Any, torch.Tensor]]] = {module: [] for module in modules}
        latest: dict[nn.Module, tuple[Any, Any]] = {}

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            latest[module] = (args, kwargs)

        handles = [
            module.register_forward_pre_hook(note, with_kwargs=True) for pair in modules.items() for module in pair
        ]
        try:
            for repeat in repeats if operands else ():
                repeat()
                for module, owner in modules.items():
                    args, kwargs = latest[owner]
                    self._calls[module].append((*latest[module], args[0] if args else kwargs["hidden_states"]))
        finally:
            for handle in handles:
                handle.remove()

    def sums(self, operand: Operand, device: torch.device) -> InputSums:
        """Return the sums over the inputs of one expert's layers, if all tokens went through that expert.

        Gate and up read what goes into the mixture of experts, which is the same for all: their sums are made once.

        Args:
            operand: The operand of the expert.
            device: Device of the sums.
        """
        if operand.parameter in self._shared:
            return self._shared[operand.parameter]
        sums = InputSums(operand.columns, device, self._sum_kind(operand), self._token_weights)

        def note(multiplied: Operand, inputs: Inputs) -> None:
            if multiplied == operand:
                rows = inputs.X.reshape(-1, inputs.X.shape[-1])
                sums.add_(rows, norm_weights(rows) if self._token_weights == "norm" else None)

        module = self._layers.module_of(operand)
        with rounded_inputs(self._layers, self._served, is_whole=False), self._layers.observed(note):
            for args, kwargs, X in self._calls[module]:
                call_alone(module, args, kwargs, X, operand.expert or 0)
        if reads_inputs(operand.parameter):
            self._shared[operand.parameter] = sums
        return sums


def is_starved(operand: Operand, num_tokens: int, experts: Experts) -> bool:
    """Tell whether an operand belongs to an expert that saw fewer tokens than the policy asks for.

    Args:
        operand: The operand of some layers.
        num_tokens: Number of tokens that reached it.
        experts: The policy about experts.
    """
    return operand.expert is not None and num_tokens < experts.min_tokens


def sufficient_statistics(names: Sequence[str], sums: InputSums) -> InputStatistics:
    """Return the statistics of an input group that saw enough tokens; the gradient's energy is left open.

    Args:
        names: Names of the layers that read the input.
        sums: Sums over the tokens, which are finished here.

    Raises:
        NumericalError: No token was seen, or an input was not finite.
    """
    H, drift, rounding = sums.finish_("+".join(names))
    tokens = sums.num_tokens
    return InputStatistics(tuple(names), H, tokens, tokens, sums.token_weights, drift=drift, rounding=rounding)


def starved_statistics(
    operand: Operand, routed_tokens: int, experts: Experts, sums: InputSums | None, device: torch.device
) -> InputStatistics:
    """Return what replaces the statistics of an expert that saw too few tokens.

    Args:
        operand: The operand of the expert.
        routed_tokens: Number of tokens that the expert saw.
        experts: The policy about such experts.
        sums: Sums over all tokens, or over all experts, as the policy says; None where the policy needs none.
        device: Device of the result.

    Raises:
        NumericalError: The policy is `fail`.
    """
    name = "+".join(operand.names)
    if experts.policy == "fail":
        raise NumericalError(
            f"{name}: {routed_tokens} calibration tokens reached this expert, experts.min_tokens is "
            f"{experts.min_tokens}; use more calibration text, or another experts.policy"
        )
    if experts.policy == "rtn":
        H = torch.eye(operand.columns, dtype=torch.float32, device=device)
        return InputStatistics(operand.names, H, 0, routed_tokens, "none", fallback=experts.policy)
    assert sums is not None
    # A copy is finished, since several experts may share these sums.
    copy = InputSums(operand.columns, device, sums.kind, sums.token_weights)
    copy.absorb_(sums)
    H, drift, rounding = copy.finish_(name)
    tokens, kind = copy.num_tokens, copy.token_weights
    return InputStatistics(operand.names, H, tokens, routed_tokens, kind, None, experts.policy, drift, rounding)
