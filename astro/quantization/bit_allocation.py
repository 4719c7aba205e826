"""Which width every group of layers gets when a width budget is to be spent, from measured layer errors."""

import dataclasses
import heapq
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from astro.config import Quantization
from astro.errors import ConfigError
from astro.model.experts import experts_of

__all__ = ["Choice", "allocate", "provisional_width", "read_choices", "require_affordable"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One group of layers that must share a width.

    Attributes:
        name: of the group.
        weights: number of its weights.
        errors: relative layer error by width; one width alone where it is set.
    """

    name: str
    weights: int
    errors: Mapping[int, float]


def allocate(choices: Sequence[Choice], average_bits: float) -> dict[str, int]:
    """Widths that make the sum of all relative layer errors small within an average width.

    Greedy on each group's lower convex hull: beginning at the smallest widths, the step that saves the most error a bit
    is taken until the next one does not fit; smaller ones that do are still taken. This is the optimum up to the last
    step.

    Args:
        choices: every group.
        average_bits: bits a weight over all groups, at most.

    Raises:
        ConfigError: even the smallest widths are more.
    """
    widths = {choice.name: min(choice.errors) for choice in choices}
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
    """The width of round 0, which measures: of the choices the one nearest to the average."""
    average = quantization.average_bits or 0.0
    return min(quantization.bit_choices, key=lambda bits: (abs(bits - average), bits))


def read_choices(layers: Sequence[Mapping[str, Any]], quantization: Quantization) -> list[Choice]:
    """What round 0 measured of every group.

    Args:
        layers: records of the round's groups, as plain dictionaries.
        quantization: of the whole run.
    """
    choices: list[Choice] = []
    experts: dict[str, list[Choice]] = {}
    for layer in layers:
        own = quantization.for_layer(layer["name"].split("+")[0])
        measured = {int(bits): float(error) for bits, error in layer["width_errors"].items()}
        errors = measured if own.bits == "auto" else {own.bits: float(layer["relative_error"])}
        choice = Choice(layer["name"], layer["rows"] * layer["columns"], errors)
        group = experts_of(layer["name"])
        choices.append(choice) if group is None else experts.setdefault(group, []).append(choice)
    return [*choices, *(_as_one(members) for members in experts.values())]


def require_affordable(quantization: Quantization, weights: Mapping[str, int]) -> None:
    """Refuse a budget that the widths set by overrides exceed already.

    Args:
        quantization: of the whole run, `bits` being `auto`.
        weights: number of weights of each quantized layer by name.

    Raises:
        ConfigError: even the smallest widths are more.
    """
    choices = []
    experts: dict[str, int | str] = {}
    for name, count in weights.items():
        own, group = quantization.for_layer(name).bits, experts_of(name)
        choices.append(Choice(name, count, {min(quantization.bit_choices) if own == "auto" else own: 0.0}))
        if group is not None and experts.setdefault(group, own) != own:
            raise ConfigError(
                f"quantization.overrides: gives {name} another width than other layers of {group}; with bits: auto all "
                "experts of a layer get one width, because servers hold them as one. Override all of them or none"
            )
    allocate(choices, quantization.average_bits or 0.0)


def _steps(choice: Choice) -> list[tuple[float, str, int, float]]:
    """Steps up the lower convex hull of error against width: minus the saving a bit, name, new width, bits spent."""
    hull: list[tuple[int, float]] = []
    for width, error in sorted(choice.errors.items()):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (width, error)):
            hull.pop()
        if not hull or error < hull[-1][1]:
            hull.append((width, error))
    return [
        (_slope(low, high) / choice.weights, choice.name, high[0], float(choice.weights * (high[0] - low[0])))
        for low, high in itertools.pairwise(hull)
    ]


def _slope(low: tuple[int, float], high: tuple[int, float]) -> float:
    return (high[1] - low[1]) / (high[0] - low[0])


def _as_one(groups: Sequence[Choice]) -> Choice:
    """All experts of a layer, which servers hold as one; it counts what the mean of them would count alone."""
    experts = {group.name.split("+")[0].rpartition(".")[0] for group in groups}
    widths = [width for width in groups[0].errors if all(width in group.errors for group in groups)]
    errors = {width: sum(group.errors[width] for group in groups) / len(experts) for width in widths}
    return Choice("+".join(group.name for group in groups), sum(group.weights for group in groups), errors)
