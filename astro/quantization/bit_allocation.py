"""The width of every input group when an average width is to be spent, chosen from what each width costs.

Where the tokens are weighted by the loss a width costs the nats that its error is predicted to cost, see
`predicted_divergence`; elsewhere it costs its relative layer error.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence

from astro.config import Quantization
from astro.errors import ConfigError
from astro.model.experts import experts_of
from astro.quantization.layer_record import LayerRecord

__all__ = ["Choice", "allocate", "are_in_nats", "choices_of", "provisional_width", "require_affordable"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Layers that must share a width: an input group, or all experts of a layer.

    Attributes:
        name: Names of the layers, joined by '+'.
        weights: Number of their weights.
        costs: What each width costs, in one measure for all choices; one width alone where an override sets it.
    """

    name: str
    weights: int
    costs: Mapping[int, float]


def allocate(choices: Sequence[Choice], average_bits: float) -> dict[str, int]:
    """Choose widths that make the sum of all costs small within an average width.

    The choice is greedy on each lower convex hull of cost against width. It begins at the smallest widths and takes
    the step that saves the most a bit, until the next one does not fit; smaller ones that do are still taken.
    This is the optimum up to the last step.

    Args:
        choices: Everything that gets a width.
        average_bits: Largest mean of bits over all weights.

    Returns:
        The width of each choice by its name.

    Raises:
        ConfigError: Even the smallest widths are more than the average.
    """
    widths = {choice.name: min(choice.costs) for choice in choices}
    budget = average_bits * sum(choice.weights for choice in choices)
    spent = float(sum(choice.weights * widths[choice.name] for choice in choices))
    if spent > budget:
        raise ConfigError(
            f"average_bits: {average_bits} is less than the smallest widths that overrides allow "
            f"({spent / sum(choice.weights for choice in choices):.3f})"
        )
    heap = [step for choice in choices for step in _steps(choice)]
    heapq.heapify(heap)
    blocked: set[str] = set()
    while heap:
        _, name, width, cost = heapq.heappop(heap)
        if name in blocked or spent + cost > budget:
            blocked.add(name)  # steps build on each other
            continue
        widths[name] = width
        spent += cost
    return widths


def provisional_width(quantization: Quantization) -> int:
    """Return the width of round 0, which measures: of the widths to choose from the one nearest to the average.

    Args:
        quantization: Settings of the whole run, `bits` being `auto`.
    """
    average = quantization.average_bits or 0.0
    return min(quantization.bit_choices, key=lambda bits: (abs(bits - average), bits))


def choices_of(layers: Iterable[LayerRecord], quantization: Quantization) -> list[Choice]:
    """Return what is to be chosen, from what round 0 measured: the experts of a layer get one width together.

    Args:
        layers: Records of the round's input groups.
        quantization: Settings of the whole run.
    """
    measured = list(layers)
    in_nats = are_in_nats(measured)
    choices: list[Choice] = []
    experts: dict[str, list[Choice]] = {}
    for layer in measured:
        bits = quantization.bits_of(layer.name.split("+")[0])
        errors = dict(layer.width_errors) if bits == "auto" else {bits: layer.relative_error}
        factor = (layer.nats_per_error or 0.0) if in_nats else 1.0
        costs = {width: factor * error for width, error in errors.items()}
        choice = Choice(layer.name, layer.rows * layer.columns, costs)
        owner = experts_of(layer.name)
        choices.append(choice) if owner is None else experts.setdefault(owner, []).append(choice)
    return [*choices, *(_as_one(members, in_nats) for members in experts.values())]


def are_in_nats(layers: Iterable[LayerRecord]) -> bool:
    """Tell whether widths are chosen by predicted nats: these are known of all layers whose inputs are known.

    Args:
        layers: Records of a round's input groups.
    """
    return all(layer.nats_per_error is not None for layer in layers if layer.num_tokens)


def require_affordable(quantization: Quantization, weights: Mapping[str, int]) -> None:
    """Refuse a budget that the widths set by overrides exceed already.

    Args:
        quantization: Settings of the whole run, `bits` being `auto`.
        weights: Number of weights of each quantized layer by name.

    Raises:
        ConfigError: Even the smallest widths are more than the average.
    """
    choices = []
    experts: dict[str, int | str] = {}
    for name, count in weights.items():
        bits, owner = quantization.bits_of(name), experts_of(name)
        choices.append(Choice(name, count, {min(quantization.bit_choices) if bits == "auto" else bits: 0.0}))
        if owner is not None and experts.setdefault(owner, bits) != bits:
            raise ConfigError(
                f"quantization.overrides: gives {name} another width than other layers of {owner}; with bits: auto all "
                "experts of a layer get one width, because servers hold them as one. Override all of them or none"
            )
    allocate(choices, quantization.average_bits or 0.0)


def _steps(choice: Choice) -> list[tuple[float, str, int, float]]:
    """Return the steps up the lower convex hull: minus the saving a bit, name, new width, bits spent."""
    hull: list[tuple[int, float]] = []
    for width, cost in sorted(choice.costs.items()):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (width, cost)):
            hull.pop()
        if not hull or cost < hull[-1][1]:
            hull.append((width, cost))
    return [
        (_slope(low, high) / choice.weights, choice.name, high[0], float(choice.weights * (high[0] - low[0])))
        for low, high in itertools.pairwise(hull)
    ]


def _slope(low: tuple[int, float], high: tuple[int, float]) -> float:
    return (high[1] - low[1]) / (high[0] - low[0])


def _as_one(choices: Sequence[Choice], in_nats: bool) -> Choice:
    """Join all experts of a layer, which servers hold as one.

    Their nats add up. By relative errors, which do not know how many tokens go to an expert, they count as much as
    their mean would alone.
    """
    experts = {choice.name.split("+")[0].rpartition(".")[0] for choice in choices}
    widths = [width for width in choices[0].costs if all(width in choice.costs for choice in choices)]
    shared = 1 if in_nats else len(experts)
    costs = {width: sum(choice.costs[width] for choice in choices) / shared for width in widths}
    return Choice("+".join(choice.name for choice in choices), sum(choice.weights for choice in choices), costs)
