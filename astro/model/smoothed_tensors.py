"""The checkpoint tensors of a block whose inputs are smoothed: what is multiplied and divided, and by which factors.

Shapes: C channels of an input, R rows of a layer that makes it.
"""

import base64
import dataclasses
import functools
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Self

import torch

from astro.errors import UnsupportedError
from astro.model.linear_layer import LinearLayer
from astro.model.scaling_places import Place

__all__ = [
    "Factors", "SmoothedInput", "TensorChange", "exact_factors", "plan_changes", "producing_layer", "smoothed_layer",
    "smoothed_tensors",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Factors:
    """Positive factors, of which most may be 1.

    Attributes:
        size: Number of factors.
        indices: Places of those that are not 1.
        values: Their values.
    """

    size: int
    indices: tuple[int, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, dense: torch.Tensor) -> Self:
        """Take over a vector.

        Args:
            dense: The factors, float64 [size].
        """
        indices = (dense != 1).nonzero().squeeze(-1)
        return cls(len(dense), tuple(indices.tolist()), tuple(dense[indices].tolist()))

    @property
    def dense(self) -> torch.Tensor:
        """All factors, float64 [size]."""
        factors = torch.ones(self.size, dtype=torch.float64)
        factors[list(self.indices)] = torch.tensor(self.values, dtype=torch.float64)
        return factors

    def to_json(self) -> dict[str, Any]:
        """Return the factors as a JSON object: of powers of two only the exponents, a byte each, in base64."""
        if self.indices and self.are_powers_of_two:
            exponents = self.dense.log2().to(torch.int8).numpy().tobytes()
            return {"size": self.size, "exponents": base64.b64encode(exponents).decode()}
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned.

        Args:
            content: JSON object with every field.
        """
        if "exponents" in content:
            exponents = bytearray(base64.b64decode(content["exponents"], validate=True))
            return cls.of(torch.exp2(torch.frombuffer(exponents, dtype=torch.int8).double()))
        return cls(int(content["size"]), tuple(map(int, content["indices"])), tuple(map(float, content["values"])))

    @property
    def largest(self) -> float:
        """The factor that is furthest from 1; 1 where all are."""
        return max(self.values, key=lambda value: max(value, 1 / value), default=1.0)

    @functools.cached_property
    def are_powers_of_two(self) -> bool:
        """Whether a float keeps all of its digits when it is multiplied by any of them."""
        mantissas, _ = torch.frexp(torch.tensor(self.values, dtype=torch.float64))
        return bool((mantissas == 0.5).all())


@dataclasses.dataclass(frozen=True)
class TensorChange:
    """What is done to one checkpoint tensor, or to the weight of one layer in it.

    Attributes:
        key: Name of the checkpoint tensor.
        layer: Name of the layer whose weight [rows, columns] in the tensor is meant; None for the whole tensor.
        axis: Axis of that weight, or of the tensor, along which the factors lie.
        divides: Whether the rows are divided by the factors of the rows. Otherwise columns are multiplied by those of
            the channels.
        offset: What a norm adds to its gain before it multiplies.
    """

    key: str
    layer: str | None
    axis: int
    divides: bool
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class SmoothedInput:
    """An input that is smoothed, or why it is not.

    Attributes:
        layers: Names of the quantized layers that read it; of experts that all read it, the parameter that holds them.
        into: Name of the module that makes the input, whose channels become smaller; empty where it is not smoothed.
        reason: Why it is not smoothed; empty where it is.
        changes: What is done to the tensors.
        columns: Factors of the channels.
        rows: Factors of the rows that make the channels.
    """

    layers: tuple[str, ...]
    into: str = ""
    reason: str = ""
    changes: tuple[TensorChange, ...] = ()
    columns: Factors = Factors(0, (), ())
    rows: Factors = Factors(0, (), ())

    def to_json(self) -> dict[str, Any]:
        """Return the input as a JSON object."""
        factors = {"columns": self.columns.to_json(), "rows": self.rows.to_json()}
        return {**dataclasses.asdict(self), **factors}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned.

        Args:
            content: JSON object with every field.
        """
        columns, rows = (Factors.from_json(content[part]) for part in ("columns", "rows"))
        changes = tuple(TensorChange(**change) for change in content["changes"])
        return cls(tuple(content["layers"]), content["into"], content["reason"], changes, columns, rows)


def producing_layer(
    place: Place, prefix: str, layers: Iterable[LinearLayer], expert: int | None = None
) -> tuple[LinearLayer, torch.Tensor] | None:
    """Return the linear layer that makes the channels of an input, and its row that makes each of them, int64 [C].

    Args:
        place: The place of the input's factors.
        prefix: Name of the block in the model, with a dot.
        layers: All linear layers of the block, quantized or not.
        expert: Index of the expert that the input is of; None outside experts.

    Returns:
        The layer and the rows; None where no single layer makes the channels.
    """
    parameter = f"{prefix}{place.weight.parameter}" if place.weight is not None else None
    for layer in layers:
        if (layer.parameter, layer.expert) != (parameter, expert):
            continue
        rows = place.rows - layer.first
        is_inside = bool((rows >= 0).all()) and bool((rows < layer.rows * layer.step).all())
        if is_inside and not bool((rows % layer.step).any()):
            return layer, rows // layer.step
    return None


def plan_changes(
    place: Place, prefix: str, layers: Sequence[LinearLayer], keys: Mapping[str, str], expert: int | None = None
) -> tuple[TensorChange, ...]:
    """Return what is done to the tensors of a block if the factors of an input go into a place.

    Args:
        place: The place.
        prefix: Name of the block in the model, with a dot.
        layers: All linear layers of the block, quantized or not.
        keys: Checkpoint tensors that hold a parameter of the block as it is, by the parameter's name in the model.
        expert: Index of the expert that alone reads the input; None where all experts read it, or none.

    Raises:
        UnsupportedError: A parameter lies in the checkpoint in another way than in the model.
    """
    by_parameter: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        by_parameter.setdefault(layer.parameter, []).append(layer)

    def whole(parameter: str, axis: int, divides: bool, offset: float = 0.0) -> TensorChange:
        key = keys.get(f"{prefix}{parameter}")
        if key is None:
            raise UnsupportedError(f"{parameter} has no tensor of its own in the checkpoint")
        return TensorChange(key, None, axis, divides, offset)

    changes: list[TensorChange] = []
    for reader in place.readers:
        members = by_parameter.get(f"{prefix}{reader.parameter}")
        if members is None:
            changes.append(whole(reader.parameter, reader.axis, divides=False))
        else:
            readers = [layer for layer in members if expert in (None, layer.expert)]
            changes += [TensorChange(layer.key, layer.name, 1, False) for layer in readers]
    if place.weight is not None:
        producer = producing_layer(place, prefix, layers, expert)
        if producer is None:
            raise UnsupportedError(f"what makes it in {place.weight.parameter} is no layer of its own")
        changes.append(TensorChange(producer[0].key, producer[0].name, 0, True))
    changes += [whole(gain, 0, True, offset) for gain, offset in place.gains.items()]
    return (*changes, *(whole(bias, 0, divides=True) for bias in place.biases))


def exact_factors(factors: torch.Tensor, gain: torch.Tensor, offset: float) -> torch.Tensor:
    """Return the factors by which a gain really becomes smaller once it is rounded to its dtype, float64 [C].

    A gain of Gemma is 1 + w, and w is stored in 16 bits. So a gain of 1/16 is one of few that can be.

    Args:
        factors: The factors as they were decided, float64 [C].
        gain: The gain as it is stored [C], without its offset.
        offset: What is added to the gain before it multiplies.
    """
    before = gain.double() + offset
    after = (before / factors - offset).to(gain.dtype).double() + offset
    is_usable = (before != 0) & (after != 0)
    return torch.where(is_usable, before / torch.where(is_usable, after, 1.0), 1.0)


def smoothed_tensors(
    tensors: Mapping[str, torch.Tensor],
    inputs: Sequence[SmoothedInput],
    layers: Iterable[LinearLayer],
    quantized: Container[str],
) -> dict[str, torch.Tensor]:
    """Return tensors of a block as its smoothed inputs want them. Tensors that change are copied.

    A weight that will be quantized becomes float32 where its dtype cannot hold the product exactly. Every other tensor
    keeps its dtype, because it is stored like that.

    Args:
        tensors: Tensors of the block by name, all or some.
        inputs: What is smoothed.
        layers: All linear layers of the block.
        quantized: Names of the layers that will be quantized.
    """
    by_name = {layer.name: layer for layer in layers}
    changed: dict[str, torch.Tensor] = {}
    for smoothed in inputs:
        for change in smoothed.changes:
            if change.key not in tensors:
                continue
            factors = smoothed.rows if change.divides else smoothed.columns
            tensor = changed.get(change.key)
            if tensor is None:
                tensor = tensors[change.key].clone()
            is_exact = tensor.dtype != torch.float16 and factors.are_powers_of_two
            if change.layer in quantized and tensor.dtype != torch.float32 and not is_exact:
                tensor = tensor.float()
            view = tensor if change.layer is None else by_name[change.layer].stored(tensor)
            along = _along(change, factors, view)
            if change.layer is None:
                view.copy_((view.double() + change.offset) * along - change.offset)
            else:
                view.mul_(along.to(view.dtype) if is_exact else along.float())
            changed[change.key] = tensor
    return {**tensors, **changed}


def smoothed_layer(name: str, W: torch.Tensor, inputs: Iterable[SmoothedInput]) -> torch.Tensor:
    """Return the weight of a layer as its smoothed inputs want it.

    Args:
        name: Name of the layer.
        W: Weight of the source [R, C], float32.
        inputs: What is smoothed.
    """
    for smoothed in inputs:
        for change in smoothed.changes:
            if change.layer == name:
                W = W * _along(change, smoothed.rows if change.divides else smoothed.columns, W).float()
    return W


def _along(change: TensorChange, factors: Factors, like: torch.Tensor) -> torch.Tensor:
    """The factors of a change along its axis, float64 on the device of a tensor."""
    shape = [1] * like.ndim
    shape[change.axis] = factors.size
    dense = factors.dense.to(like.device).reshape(shape)
    return 1 / dense if change.divides else dense
