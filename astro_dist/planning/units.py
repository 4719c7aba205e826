"""The units of a run: blocks that are quantized, and tensors that are copied."""

import dataclasses
import functools
from typing import Any

from astro.model.forward_shape import ForwardShape
from astro.model.linear_layer import LinearLayer
from astro_dist.planning.coverage import Coverage
from astro_dist.schedule.names import block_name, copy_unit

__all__ = ["BlockUnit", "CopyUnit", "Plan"]


@dataclasses.dataclass(frozen=True)
class BlockUnit:
    """One transformer block.

    Attributes:
        index: Index of the block.
        keys: Names of all checkpoint tensors of the block.
        linears: Linear layers of the block that are quantized.
        file: Name of the shard that the block becomes.
        read_bytes: Size of the block's tensors in the source, in bytes.
        held_bytes: Size of the block's tensors once they are read, in bytes. It is larger where they are decoded.
        written_bytes: Size of the block's tensors in the result, in bytes, without headers. With a width budget it is
            an estimate.
    """

    index: int
    keys: tuple[str, ...]
    linears: tuple[LinearLayer, ...]
    file: str
    read_bytes: int
    held_bytes: int
    written_bytes: int

    @property
    def name(self) -> str:
        """The short name of the block, e.g. `block-0007`; its unit in a round names the round too."""
        return block_name(self.index)

    @functools.cached_property
    def by_name(self) -> dict[str, LinearLayer]:
        """The layers that are quantized, by name."""
        return {linear.name: linear for linear in self.linears}


@dataclasses.dataclass(frozen=True)
class CopyUnit:
    """Tensors outside the blocks (embeddings, norm, head) that are copied as they are.

    Attributes:
        index: Index of the unit.
        keys: Names of the checkpoint tensors.
        file: Name of the shard that the tensors become.
        read_bytes: Size of the tensors in the source, in bytes.
        written_bytes: Size of the tensors once they are read, and in the result, in bytes.
    """

    index: int
    keys: tuple[str, ...]
    file: str
    read_bytes: int
    written_bytes: int

    @property
    def name(self) -> str:
        """The name of the unit, e.g. `copy-0000`."""
        return copy_unit(self.index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All units of a run, and what is known of the model before anything is read but headers.

    Attributes:
        blocks: Units of the blocks, in the model's order.
        copies: Units of all other tensors.
        ignore: Names of the linear modules that are not quantized, as the result's config lists them.
        outside: Names of the checkpoint tensors outside the blocks that text needs: embeddings, norm and head.
        outside_weights: Number of elements of these tensors.
        hidden_size: Width of the hidden states between blocks; with hyper-connections, that of all lanes.
        vocab_size: Number of tokens that the model knows.
        weights: Number of weights that are quantized.
        coverage: What is quantized, and what is left as it is.
        unknown: Names of the checkpoint tensors that the model's class does not have and that are of no known part.
            They are copied too.
        other_matrices: Model's names of the matrices in blocks that are gates or no linear layers. They stay as they
            are.
        indivisible_layers: Names of the layers whose input width the group size does not divide, where the
            configuration says what to do with them.
        expert_share: Share of the tokens that reaches an expert, or 1 where there are no experts.
        forward_shape: Sizes that the memory of a forward depends on.
        needless_ignore: Patterns of `quantization.ignore` for what is never quantized, such as lm_head.
        left_out: Names of the checkpoint tensors that the result does not have, because no model reads them.
    """

    blocks: tuple[BlockUnit, ...]
    copies: tuple[CopyUnit, ...]
    ignore: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    outside_weights: int
    hidden_size: int
    vocab_size: int
    weights: int
    coverage: Coverage
    unknown: tuple[str, ...] = ()
    other_matrices: tuple[str, ...] = ()
    indivisible_layers: tuple[str, ...] = ()
    expert_share: float = 1.0
    forward_shape: ForwardShape = dataclasses.field(default_factory=ForwardShape)
    needless_ignore: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def read_bytes(self) -> int:
        """The size of the source in bytes."""
        return sum(unit.read_bytes for unit in self.blocks) + sum(unit.read_bytes for unit in self.copies)

    @property
    def written_bytes(self) -> int:
        """The size of the result in bytes, without headers."""
        return sum(unit.written_bytes for unit in self.blocks) + sum(unit.written_bytes for unit in self.copies)

    @property
    def files(self) -> list[str]:
        """The names of all shards of the result, in order."""
        return sorted([unit.file for unit in self.blocks] + [unit.file for unit in self.copies])

    def summary(self) -> dict[str, Any]:
        """Return the units and their sizes as JSON types."""
        return {
            "blocks": [
                {"unit": unit.name, "linears": len(unit.linears), "read_bytes": unit.read_bytes,
                 "written_bytes": unit.written_bytes, "file": unit.file}
                for unit in self.blocks
            ],
            "copies": [
                {"unit": unit.name, "read_bytes": unit.read_bytes, "written_bytes": unit.written_bytes,
                 "file": unit.file}
                for unit in self.copies
            ],
            "quantized_weights": self.weights,
            "coverage": self.coverage.to_json(),
            "ignored": list(self.ignore),
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
        }  # fmt: skip
