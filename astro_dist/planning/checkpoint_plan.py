"""The plan of a run, made from its configuration and the headers of its checkpoint: nothing else is read.

It does not depend on the number of workers.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from astro.config import Quantization
from astro.errors import CheckpointError, ConfigError, UnsupportedError
from astro.model.forward_shape import forward_shape
from astro.model.linear_layer import LinearLayer
from astro.model.skeleton import Skeleton
from astro.storage.bit_packing import words_per_row
from astro.storage.checkpoint import Checkpoint
from astro.storage.shard_header import TensorEntry
from astro_dist.planning.patterns import matches, needless_patterns, require_matching
from astro_dist.planning.units import BlockUnit, CopyUnit, Plan
from astro_dist.planning.unquantized import (
    copied_matrices,
    linear_modules,
    names_beside_text_in_servers,
    names_in_the_decoder_alone,
)
from astro_dist.planning.weight_count import coverage_of, is_multi_token

__all__ = ["TensorPlaces", "assign_tensors", "make_plan"]

_COPY_BYTES = 1 << 30
"""Size in bytes up to which copied tensors are put into one shard."""


@dataclasses.dataclass(frozen=True)
class TensorPlaces:
    """Names of the checkpoint's tensors, by where they belong.

    Attributes:
        by_block: Tensors of each block, by the block's index.
        outside: Tensors that text needs outside the blocks.
        copied: All tensors outside the blocks, those that the model does not have among them.
        unknown: Tensors that the model does not have, in blocks or outside.
        left_out: Tensors that the result does not have.
    """

    by_block: dict[int, list[str]]
    outside: list[str]
    copied: list[str]
    unknown: list[str]
    left_out: list[str]


@dataclasses.dataclass(frozen=True)
class _PlannedBlock:
    """The unit of a block, and what else was learned of its layers.

    Attributes:
        unit: Unit of the block.
        layers: Linear layers of the block, quantized or not.
        other_matrices: Model's names of all other matrices of the block.
        indivisible_layers: Names of the layers whose input width the group size does not divide, where there is a
            policy.
    """

    unit: BlockUnit
    layers: list[LinearLayer]
    other_matrices: list[str]
    indivisible_layers: list[str]


def make_plan(checkpoint: Checkpoint, skeleton: Skeleton, quantization: Quantization) -> Plan:
    """Cut a checkpoint into units.

    Args:
        checkpoint: Opened checkpoint of the source.
        skeleton: The model on the meta device.
        quantization: Settings that say which layers are quantized, and to what.

    Returns:
        The plan.

    Raises:
        ConfigError: A group size does not divide a layer, or patterns leave nothing to quantize.
        UnsupportedError: A block cannot be quantized, or the checkpoint is quantized already.
        CheckpointError: A block's tensor is missing, or has another shape than in the model.
    """
    tensors = assign_tensors(checkpoint, skeleton)
    copies, blocks = _plan_copies(checkpoint, skeleton, tensors), []
    for index in range(len(skeleton.blocks)):
        file = _shard_name(len(copies) + index, len(copies) + len(skeleton.blocks))
        blocks.append(_plan_block(checkpoint, skeleton, quantization, index, tensors.by_block.get(index, []), file))
    names = [layer.name for block in blocks for layer in block.layers]
    stored = (key.removesuffix(".weight") for key in checkpoint.entries)
    modules = (name for name, _ in skeleton.model.named_modules())
    needless = needless_patterns(quantization.ignore, names, (*modules, *stored))
    require_matching("quantization.ignore", [p for p in quantization.ignore if p not in needless], names)
    require_matching("quantization.overrides", quantization.overrides, names)
    quantized = {linear.name: linear for block in blocks for linear in block.unit.linears}
    if not quantized:
        raise ConfigError(f"quantization.ignore {list(quantization.ignore)}: leaves no linear layer to quantize")
    units = [(block.unit.keys, block.unit.linears) for block in blocks]
    coverage = coverage_of(checkpoint, skeleton, units, tensors.copied)
    return Plan(
        blocks=tuple(block.unit for block in blocks),
        copies=tuple(copies),
        ignore=_unquantized(checkpoint, skeleton, blocks, tensors.left_out),
        outside=tuple(tensors.outside),
        outside_weights=sum(math.prod(checkpoint.entries[key].shape) for key in tensors.outside),
        hidden_size=skeleton.hidden_size,
        vocab_size=skeleton.limits()[0],
        weights=coverage.quantized,
        coverage=coverage,
        unknown=tuple(key for key in tensors.unknown if not is_multi_token(skeleton, key)),
        other_matrices=tuple(name for block in blocks for name in block.other_matrices),
        indivisible_layers=tuple(name for block in blocks for name in block.indivisible_layers),
        expert_share=skeleton.expert_share,
        forward_shape=forward_shape(skeleton),
        needless_ignore=needless,
        left_out=tuple(tensors.left_out),
    )


def assign_tensors(checkpoint: Checkpoint, skeleton: Skeleton) -> TensorPlaces:
    """Find where each tensor belongs, and refuse those that do not fit the model.

    Args:
        checkpoint: Opened checkpoint of the model.
        skeleton: The model on the meta device.

    Raises:
        CheckpointError: A tensor has another shape than in the model, or one that text needs is missing.
        UnsupportedError: A weight is stored as integers, and config.json does not say how it is quantized.
    """
    unread = skeleton.unread(checkpoint.entries)
    tensors = TensorPlaces({}, [], [], [], [key for key in checkpoint.entries if key in unread])
    targets: set[str] = set()
    # Tables of integers (routing by token, positions) are what the model has integers for.
    floats = {name for name, tensor in skeleton.model.state_dict().items() if tensor.is_floating_point()}
    for key, entry in checkpoint.entries.items():
        if key in unread:
            continue
        target, converted = skeleton.target_of(key)
        index = skeleton.block_of(target)
        if index is not None:
            tensors.by_block.setdefault(index, []).append(key)
        else:
            tensors.copied.append(key)
        expected = skeleton.shape_of(target)
        if expected is None:
            tensors.unknown.append(key)
            continue
        targets.add(target)
        if index is None and not skeleton.is_beside_text(target):
            tensors.outside.append(key)
        if not converted and expected != entry.shape:
            extra = skeleton.num_zero_experts_in(target, entry.shape)
            if extra:
                raise UnsupportedError(
                    f"{checkpoint.place(key)}: tensor {key} is {list(entry.shape)}: its last {extra} experts pass "
                    "their input on, and nothing reads their weights. They are left out where each expert has a tensor "
                    "of its own, not where all share one; give the files of the Hub, or save them anew with "
                    "transformers' save_pretrained"
                )
            raise CheckpointError(
                f"{checkpoint.place(key)}: tensor {key} is {list(entry.shape)}, but config.json makes it "
                f"{list(expected)}; config.json and the shards are of different models"
            )
        if entry.float_dtype is None and target in floats:
            raise UnsupportedError(
                f"{checkpoint.place(key)}: tensor {key} is stored as {entry.dtype}, the model computes with floats; "
                "it is quantized, and config.json does not say how (quantization_config). Give a complete checkpoint, "
                "or the original one in 16 or 32 bits"
            )
    skeleton.require_covered(targets)
    return tensors


def _plan_copies(checkpoint: Checkpoint, skeleton: Skeleton, tensors: TensorPlaces) -> list[CopyUnit]:
    """Cut the copied tensors into units of about the same size."""
    shards = _cut(checkpoint, tensors.copied)
    num_shards = len(shards) + len(skeleton.blocks)
    return [
        CopyUnit(
            index, tuple(keys), _shard_name(index, num_shards), checkpoint.size_bytes(keys), checkpoint.held_bytes(keys)
        )
        for index, keys in enumerate(shards)
    ]


def _plan_block(
    checkpoint: Checkpoint, skeleton: Skeleton, quantization: Quantization, index: int, keys: list[str], file: str
) -> _PlannedBlock:
    """Choose the layers of a block that are quantized."""
    layers, other_matrices = skeleton.linear_layers(index, keys, {key: checkpoint.entries[key].shape for key in keys})
    linears = [linear for linear in layers if not matches(linear.name, quantization.ignore)]
    indivisible: dict[str, LinearLayer] = {}
    if quantization.indivisible != "fail":
        indivisible = {c.name: c for c in linears if quantization.is_indivisible(c.name, c.columns)}
    if quantization.indivisible == "keep":
        linears = [linear for linear in linears if linear.name not in indivisible]
    _require_shapes(checkpoint, layers, linears)
    written = _written_bytes(checkpoint.entries, keys, linears, quantization)
    read, held = checkpoint.size_bytes(keys), checkpoint.held_bytes(keys)
    unit = BlockUnit(index, tuple(keys), tuple(linears), file, read, held, written)
    return _PlannedBlock(unit, layers, other_matrices, list(indivisible))


def _unquantized(
    checkpoint: Checkpoint, skeleton: Skeleton, blocks: Sequence[_PlannedBlock], left_out: Iterable[str]
) -> tuple[str, ...]:
    """Return the names that the result's config lists as not quantized, transformers' names before the files' names."""
    layers = [name for block in blocks for layer in block.layers for name in layer.config_names]
    modules = linear_modules(skeleton, layers, [name for block in blocks for name in block.other_matrices])
    quantized = {name for block in blocks for linear in block.unit.linears for name in linear.config_names}
    replaced = {*left_out, *(linear.key for block in blocks for linear in block.unit.linears)}
    copied = copied_matrices(skeleton, checkpoint.entries, (key for key in checkpoint.entries if key not in replaced))
    names = [name for name in (*modules, *copied) if name not in quantized]
    elsewhere = names_beside_text_in_servers(skeleton, names), names_in_the_decoder_alone(skeleton, names)
    return tuple(dict.fromkeys((*names, *elsewhere[0], *elsewhere[1])))


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
    shards: list[list[str]] = []
    size = _COPY_BYTES
    for key in keys:
        size += checkpoint.entries[key].size_bytes
        if size > _COPY_BYTES:
            shards.append([])
            size = checkpoint.entries[key].size_bytes
        shards[-1].append(key)
    return shards


def _shard_name(index: int, total: int) -> str:
    return f"model-{index + 1:05d}-of-{total:05d}.safetensors"


def _written_bytes(
    entries: Mapping[str, TensorEntry], keys: Iterable[str], linears: Iterable[LinearLayer], settings: Quantization
) -> int:
    """Size of a block's tensors in the result, in bytes, without headers."""
    replaced = {linear.key for linear in linears}
    total = sum(entries[key].size_bytes for key in keys if key not in replaced)
    for linear in linears:
        scheme = settings.possible_schemes(linear.name, linear.columns)[0]
        # With a budget the width is only known after the round that measures.
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
