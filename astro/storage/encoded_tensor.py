"""A weight that a checkpoint stores as small numbers and scales, and that its readers get in 16 bits.

It is read by slices along its first dimension, so that neither all of its numbers nor a float32 copy of it need to be
in memory: rows of a matrix, and experts where all of them share a tensor.
"""

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping
from typing import Self

import torch

from astro.errors import CheckpointError
from astro.storage.bit_packing import unpack, words_per_row
from astro.storage.byte_store import Range
from astro.storage.decoding import block_values, float4_values, scale_values
from astro.storage.shard_header import StoredTensor, TensorEntry

__all__ = ["EncodedTensor", "Numbers", "Slice"]

_WORD_RUN = 32
"""Integers that fill a whole number of words at every width."""


class Numbers(enum.Enum):
    """How the numbers of a weight are stored."""

    FLOAT8 = "FP8"
    INT8 = "INT8"
    FLOAT4 = "FP4"
    PACKED = "packed integers"


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice is some part of an encoded tensor that is read and decoded in one piece.

    Attributes:
        first: Index of its first element along the first dimension of the weight.
        last: Index behind its last element.
        parts: Memory for the stored tensors, by their role.
        ranges: Ranges of bytes that fill the memory.
    """

    first: int
    last: int
    parts: Mapping[str, torch.Tensor]
    ranges: tuple[Range, ...]


@dataclasses.dataclass(frozen=True)
class EncodedTensor(TensorEntry):
    """A weight in another encoding than floats of 16 bits or more. Its dtype and shape are those of the decoded weight.

    Attributes:
        numbers: How its numbers are stored.
        bits: Bits of a number.
        block: Rows and columns that share a scale; None where the scales have the weight's number of dimensions and
            are broadcast, for a scale by tensor, row or column.
        parts: The stored tensors by role: "weight" and "scale" always; "global_scale", "zero_point" and "column_group"
            (the group of each column) where the format has them.
        transposed: Whether the numbers are stored with the last two dimensions of the weight exchanged.
        divides: Whether the scale is divided by the global scale, and not multiplied.
    """

    numbers: Numbers
    bits: int
    block: tuple[int, int] | None
    parts: Mapping[str, StoredTensor]
    transposed: bool = False
    divides: bool = False

    def checked(self) -> Self:
        """Return the tensor itself if its stored tensors fit each other.

        Raises:
            CheckpointError: A stored tensor has another shape than the weight and the block ask for.
        """
        rows, columns = self._stored_shape[-2:]
        weight, words = self.parts["weight"], words_per_row(columns, self.bits)
        if self.numbers is Numbers.PACKED and weight.shape[-1] != words:
            raise CheckpointError(
                f"{weight.file}: tensor {weight.name} is {list(weight.shape)}, but its weight_shape, or its scales and "
                f"config.json, make it {columns} columns of {self.bits} bits: expected {[rows, words]}; a last group "
                "that is partial needs a weight_shape; fetch the checkpoint again, or give the original 16-bit one"
            )
        for role in ("scale", "zero_point"):
            part = self.parts.get(role)
            if part is None or (self.block is None and _broadcasts(part.shape, self._stored_shape)):
                continue
            lead, (rows_per_block, columns_per_block) = self._stored_shape[:-2], self.block or (1, columns)
            expected = (*lead, math.ceil(rows / rows_per_block), math.ceil(columns / columns_per_block))
            if role == "zero_point" and self.numbers is Numbers.PACKED:
                expected = (words_per_row(rows, self.bits), expected[-1])
            if part.shape != expected:
                what = f"in blocks of {rows_per_block} × {columns_per_block}" if self.block else "with a scale a row"
                raise CheckpointError(
                    f"{part.file}: tensor {part.name} is {list(part.shape)}, but config.json says that {self.name} "
                    f"{[*lead, rows, columns]} is stored {what}: expected {list(expected)}"
                )
        return self

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that it is decoded from."""
        return tuple(self.parts.values())

    @property
    def label(self) -> str:
        """What the encoding is called, e.g. "FP8 in blocks of 128 × 128"."""
        name = f"{self.bits}-bit integers" if self.numbers is Numbers.PACKED else self.numbers.value
        if self.numbers is Numbers.FLOAT4:
            name = "NVFP4" if "global_scale" in self.parts else "MXFP4"
        if self.block is None:
            return f"{name} by {'tensor' if math.prod(self.parts['scale'].shape) == 1 else 'channel'}"
        rows, columns = self.block
        return f"{name} in groups of {columns}" if rows == 1 else f"{name} in blocks of {rows} × {columns}"

    def slices(self, num_elements: int) -> Iterator[Slice]:
        """Cut the weight into slices, in order, each with new memory that is still to be filled.

        Args:
            num_elements: Number of elements of the weight in a slice. It is exceeded where the format asks for more.
        """
        steps = {role: self._step(role) for role in self.parts}
        step = math.lcm(*(per for _, per in filter(None, steps.values())))
        length = self.shape[0]
        per_slice = max(num_elements * length // max(math.prod(self.shape), 1) // step, 1) * step
        for first in range(0, length, per_slice):
            last = min(first + per_slice, length)
            memory = {role: self._memory(role, steps[role], first, last) for role in self.parts}
            yield Slice(
                first,
                last,
                {role: tensor for role, (tensor, _) in memory.items()},
                tuple(span for _, span in memory.values()),
            )

    def decode(self, part: Slice) -> torch.Tensor:
        """Return a slice of the weight, computed in float32 and rounded to the weight's dtype.

        Args:
            part: The slice, whose memory is filled.

        Returns:
            The weights, [last − first, ...].
        """
        stored = self._stored_shape
        *lead, rows, columns = stored
        if len(stored) == 2:
            rows = part.last - part.first
        else:
            lead[0] = part.last - part.first
        V = self._values(part.parts["weight"], columns).reshape(*lead, rows, columns)
        zero_point = part.parts.get("zero_point")
        if zero_point is not None:
            values, view = self._spread(self._zero_points(zero_point, rows), V, part)
            view -= values
        scale, global_scale = scale_values(part.parts["scale"]), part.parts.get("global_scale")
        if global_scale is not None:
            scale = scale / global_scale.float() if self.divides else scale * global_scale.float()
        values, view = self._spread(scale, V, part)
        view *= values
        return (V.transpose(-1, -2) if self.transposed else V).to(self.torch_dtype)

    @property
    def _stored_shape(self) -> tuple[int, ...]:
        """Sizes of the matrix of numbers: those of the weight, or with the last two exchanged."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    def _step(self, role: str) -> tuple[int, int] | None:
        """Return how many slices of a stored tensor belong to how many of the weight; None where it is read whole."""
        part = self.parts[role]
        if role in ("global_scale", "column_group") or not part.shape:
            return None
        if len(self.shape) > 2 or role == "weight":
            return (1, 1) if part.shape[0] == self.shape[0] else None
        if role == "zero_point" and self.numbers is Numbers.PACKED:
            return self.bits, _WORD_RUN
        if self.block is not None:
            return 1, self.block[0]
        return (1, 1) if part.shape[0] == self.shape[0] else None

    def _memory(self, role: str, step: tuple[int, int] | None, first: int, last: int) -> tuple[torch.Tensor, Range]:
        part = self.parts[role]
        if step is None:
            return part.to_read()
        return part.rows_to_read(first * step[0] // step[1], min(-(-last * step[0] // step[1]), part.shape[0]))

    def _values(self, weight: torch.Tensor, columns: int) -> torch.Tensor:
        if self.numbers is Numbers.FLOAT4:
            return float4_values(weight)
        if self.numbers is Numbers.PACKED:
            return unpack(weight.flatten(0, -2), self.bits, columns).float()
        return weight.float()

    def _zero_points(self, zero_point: torch.Tensor, rows: int) -> torch.Tensor:
        if self.numbers is Numbers.PACKED:
            return unpack(zero_point.T, self.bits, rows).T.float()
        return zero_point.float()

    def _spread(self, values: torch.Tensor, V: torch.Tensor, part: Slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values of blocks, and a view of the numbers that they are broadcast against."""
        column_group = part.parts.get("column_group")
        if column_group is not None and not bool((column_group < 0).any()):  # -1: columns are in order
            return values[..., column_group.long()], V
        if self.block is not None:
            return block_values(values, self.block, V)
        # One value for each row, or for each expert.
        return (values.reshape(-1, *[1] * (len(self.shape) - 1)) if values.ndim == 1 else values), V


def _broadcasts(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Tell whether scales are one for the tensor, or one for each row, or lie along dimensions of the weight."""
    if math.prod(scale) == 1 or scale == weight[:1]:
        return True
    return len(scale) == len(weight) and all(size in (1, whole) for size, whole in zip(scale, weight, strict=True))
