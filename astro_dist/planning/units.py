"""Config and headers to units of work. Pure: nothing is read but headers, nothing depends on the number of workers."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from astro.config import Quantization
from astro.errors import CheckpointError, ConfigError, UnsupportedError
from astro.formats.bit_packing import words_per_row
from astro.model.linear_layer import LinearLayer
from astro.model.skeleton import Skeleton
from astro.storage.checkpoint import Checkpoint, TensorEntry
from astro_dist.schedule.names import block_name, copy_unit

__all__ = ["BlockUnit", "CopyUnit", "Plan", "make_plan"]

_COPY_BYTES = 1 << 30
"""Tensors that are copied go into shards of about this size."""


@dataclasses.dataclass(frozen=True)
class BlockUnit:
    """One transformer block.

    Attributes:
        index: of the block.
        keys: every checkpoint tensor of the block.
        linears: its layers that are quantized.
        file: shard that it becomes.
        read_bytes: size of its tensors in the source.
        written_bytes: size of its tensors in the result, headers not counted; with a width budget an estimate.
    """

    index: int
    keys: tuple[str, ...]
    linears: tuple[LinearLayer, ...]
    file: str
    read_bytes: int
    written_bytes: int

    @property
    def name(self) -> str:
        """Short name, e.g. `block-0007`; the unit of a round that quantizes it carries the round's too."""
        return block_name(self.index)

    @functools.cached_property
    def by_name(self) -> dict[str, LinearLayer]:
        """Its layers that are quantized by name."""
        return {linear.name: linear for linear in self.linears}


@dataclasses.dataclass(frozen=True)
class CopyUnit:
    """Tensors outside the blocks (embeddings, norm, head), copied as they are.

    Attributes:
        index: of the unit.
        keys: checkpoint tensors.
        file: shard that they become.
        read_bytes: their size.
    """

    index: int
    keys: tuple[str, ...]
    file: str
    read_bytes: int

    @property
    def name(self) -> str:
        """Unit name, e.g. `copy-0000`."""
        return copy_unit(self.index)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every unit of a run.

    Attributes:
        blocks: in the model's order.
        copies: of everything else.
        ignore: names of linear modules that are not quantized, for the written config.
        outside: checkpoint tensors that the model has outside its blocks.
        outside_weights: their number of elements.
        hidden_size: width of the hidden states between blocks.
        vocab_size: tokens that the model knows.
        weights: number of weights that are quantized.
        unknown: checkpoint tensors that the model's class does not have; they are copied too.
        others: matrices of the blocks that are not linear layers, or gates; they stay as they are.
        expert_share: share of the tokens that reaches an expert; 1 where there are none.
        odd: names of layers whose width is no multiple of the group size, where that has a policy.
    """

    blocks: tuple[BlockUnit, ...]
    copies: tuple[CopyUnit, ...]
    ignore: tuple[str, ...]
    outside: tuple[str, ...]
    outside_weights: int
    hidden_size: int
    vocab_size: int
    weights: int
    unknown: tuple[str, ...]
    others: tuple[str, ...] = ()
    expert_share: float = 1.0
    odd: tuple[str, ...] = ()

    @property
    def read_bytes(self) -> int:
        """Bytes of the source."""
        return sum(unit.read_bytes for unit in self.blocks) + sum(unit.read_bytes for unit in self.copies)

    @property
    def written_bytes(self) -> int:
        """Bytes of the result, headers not counted."""
        return sum(unit.written_bytes for unit in self.blocks) + sum(unit.read_bytes for unit in self.copies)

    def summary(self) -> dict[str, Any]:
        """Units and bytes as JSON types."""
        return {
            "blocks": [
                {"unit": unit.name, "linears": len(unit.linears), "read_bytes": unit.read_bytes,
                 "written_bytes": unit.written_bytes, "file": unit.file}
                for unit in self.blocks
            ],
            "copies": [{"unit": unit.name, "read_bytes": unit.read_bytes, "file": unit.file} for unit in self.copies],
            "quantized_weights": self.weights,
            "ignored": list(self.ignore),
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
        }  # fmt: skip

    @property
    def files(self) -> list[str]:
        """Every shard of the result, in order."""
        return sorted([unit.file for unit in self.blocks] + [unit.file for unit in self.copies])


def make_plan(checkpoint: Checkpoint, skeleton: Skeleton, quantization: Quantization) -> Plan:
    """Cut a checkpoint into units.

    Args:
        checkpoint: source, opened.
        skeleton: its meta model.
        quantization: which layers are quantized, and to what.

    Raises:
        ConfigError: a group size that does not divide a layer, or patterns that leave nothing to quantize.
        UnsupportedError: a block that cannot be quantized, or a checkpoint that is quantized already.
        CheckpointError: a block's tensor is missing, or has another shape than in the model.
    """
    by_block, outside, rest, unknown = _assign(checkpoint, skeleton)
    copied = _cut(checkpoint, rest)
    total = len(copied) + len(skeleton.blocks)
    blocks = []
    found: dict[str, LinearLayer] = {}
    others: list[str] = []
    odd: list[str] = []
    for index in range(len(skeleton.blocks)):
        keys = by_block.get(index, [])
        layers, rest = skeleton.linear_layers(index, keys)
        found |= {linear.name: linear for linear in layers}
        others += rest
        linears = [linear for linear in layers if not _matches(linear.name, quantization.ignore)]
        if quantization.indivisible != "fail":
            indivisible = {c.name: c for c in linears if quantization.is_indivisible(c.name, c.columns)}
            odd += indivisible
            if quantization.indivisible == "keep":
                linears = [linear for linear in linears if linear.name not in indivisible]
        _require_shapes(checkpoint, layers, linears)
        file = _shard_name(len(copied) + index, total)
        written = _written_bytes(checkpoint.entries, keys, linears, quantization)
        blocks.append(BlockUnit(index, tuple(keys), tuple(linears), file, checkpoint.size_bytes(keys), written))
    _require_matching("quantization.ignore", quantization.ignore, list(found))
    _require_matching("quantization.overrides", quantization.overrides, list(found))
    quantized = {linear.name: linear for unit in blocks for linear in unit.linears}
    if not quantized:
        raise ConfigError(f"quantization.ignore {list(quantization.ignore)}: leaves no linear layer to quantize")
    modules = [name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Linear)]
    gates = [name.removesuffix(".weight") for name in others if name.endswith(".weight")]
    # Servers know a gate by the name that the file gives it.
    stored = {skeleton.target_of(key)[0]: key.removesuffix(".weight") for unit in blocks for key in unit.keys}
    gates += [stored[name] for name in others if name in stored]
    ignore = [name for name in dict.fromkeys((*modules, *found, *gates)) if name not in quantized]
    copies = [
        CopyUnit(index, tuple(keys), _shard_name(index, total), checkpoint.size_bytes(keys))
        for index, keys in enumerate(copied)
    ]
    weights = sum(linear.rows * linear.columns for linear in quantized.values())
    outside_weights = sum(math.prod(checkpoint.entries[key].shape) for key in outside)
    return Plan(
        tuple(blocks), tuple(copies), tuple(ignore), tuple(outside), outside_weights, skeleton.hidden_size,
        skeleton.limits()[0], weights, tuple(unknown), tuple(others), skeleton.expert_share,
        tuple(odd),
    )  # fmt: skip


def _assign(checkpoint: Checkpoint, skeleton: Skeleton) -> tuple[dict[int, list[str]], list[str], list[str], list[str]]:
    """Tensors of each block; those the model has outside its blocks; all outside blocks; those it does not have."""
    by_block: dict[int, list[str]] = {}
    targets: set[str] = set()
    outside, rest, unknown = [], [], []
    for key, entry in checkpoint.entries.items():
        target, converted = skeleton.target_of(key)
        index = skeleton.block_of(target)
        if index is not None:
            by_block.setdefault(index, []).append(key)
        else:
            rest.append(key)
        expected = skeleton.shape_of(target)
        if expected is None:
            unknown.append(key)
            continue
        targets.add(target)
        if index is None:
            outside.append(key)
        if not converted and expected != entry.shape:
            raise CheckpointError(
                f"{checkpoint.place(key)}: tensor {key} is {list(entry.shape)}, but config.json makes it "
                f"{list(expected)}; config.json and the shards are of different models"
            )
        if entry.float_dtype is None:
            raise UnsupportedError(
                f"{checkpoint.place(key)}: tensor {key} is stored as {entry.dtype}: quantized already; "
                "give the original 16-bit or 32-bit checkpoint"
            )
    skeleton.require_covered(targets)
    return by_block, outside, rest, unknown


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _require_matching(option: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"{option}: {pattern!r} matches no linear layer of the blocks, e.g. {names[-1]}")


def _require_shapes(checkpoint: Checkpoint, layers: Iterable[LinearLayer], quantized: Sequence[LinearLayer]) -> None:
    """Refuse experts of other sizes than the model's, and a fused tensor that would be quantized in parts."""
    chosen = {linear.name for linear in quantized}
    fused = {linear.key for linear in quantized}
    for linear in layers:
        shape = checkpoint.entries[linear.key].shape
        if linear.expert is not None and len(shape) == 2 and shape != (linear.rows, linear.columns):
            raise CheckpointError(
                f"{checkpoint.place(linear.key)}: tensor {linear.key} is {list(shape)}, but config.json makes it "
                f"{[linear.rows, linear.columns]}; config.json and the shards are of different models"
            )
        if linear.name not in chosen and linear.key in fused:
            raise ConfigError(
                f"quantization.ignore: {linear.name} lies in one tensor with layers that are quantized, "
                f"{linear.key}; ignore all of them or none"
            )


def _cut(checkpoint: Checkpoint, keys: Iterable[str]) -> list[list[str]]:
    groups: list[list[str]] = []
    size = _COPY_BYTES
    for key in keys:
        size += checkpoint.entries[key].size_bytes
        if size > _COPY_BYTES:
            groups.append([])
            size = checkpoint.entries[key].size_bytes
        groups[-1].append(key)
    return groups


def _shard_name(index: int, total: int) -> str:
    return f"model-{index + 1:05d}-of-{total:05d}.safetensors"


def _written_bytes(
    entries: Mapping[str, TensorEntry], keys: Iterable[str], linears: Iterable[LinearLayer], settings: Quantization
) -> int:
    replaced = {linear.key for linear in linears}
    total = sum(entries[key].size_bytes for key in keys if key not in replaced)
    for linear in linears:
        scheme = settings.possible_schemes(linear.name, linear.columns)[0]
        # With a budget the width is only known after the measuring round.
        is_open = settings.bits_of(linear.name) == "auto"
        bits = math.ceil(settings.average_bits or 0) if is_open else scheme.bits
        try:
            groups = linear.columns // scheme.columns_per_group(linear.columns)
        except ConfigError as error:
            raise ConfigError(f"quantization: {linear.name}: {error}") from error
        entry = entries[linear.key]
        scale_bytes = linear.rows * groups * (entry.size_bytes // math.prod(entry.shape))
        zero_bytes = 0 if scheme.symmetric else 4 * groups * words_per_row(linear.rows, bits)
        total += 4 * linear.rows * words_per_row(linear.columns, bits) + scale_bytes + zero_bytes + 16
    return total
