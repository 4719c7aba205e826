"""Over how many GPUs vLLM can cut the layers of a quantized model (tensor parallelism).

Layers that end a part of a block are cut along their inputs, and no group of columns may be cut in two: the inputs on
each GPU have to be a multiple of the group size. Read in the source of vLLM 0.32 (`CompressedTensorsWNA16`,
`CompressedTensorsWNA16MoEMethod`), for dense layers and experts alike. Experts may be spread whole instead
(`--enable-expert-parallel`).

Attention is cut by heads: each GPU has equally many. Heads of keys and values are either divided too, or, where there
are fewer than GPUs, each is held by equally many of them (`QKVParallelLinear`).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from astro.config import PER_CHANNEL, SERVED_GROUP_SIZES, LayerScheme
from astro.model.head_counts import HeadCounts
from astro.model.linear_layer import LinearLayer

__all__ = ["TensorParallelLimit", "tensor_parallel_limit"]

_CUT_ALONG_INPUTS = (
    "o_proj", "down_proj", "w2", "out_proj", "wo", "dense", "dense_4h_to_h", "fc2", "c_proj", "output_linear", "fc_out",
)  # fmt: skip
"""Last parts of the names of layers that vLLM cuts along their inputs."""
_COMMON_SIZE = 8
"""GPUs of most machines that serve large models; a smaller limit deserves advice."""
_MOST_GPUS = 64
"""The largest number of GPUs that is tried."""


@dataclasses.dataclass(frozen=True)
class TensorParallelLimit:
    """The numbers of GPUs over which vLLM can cut every layer.

    Attributes:
        sizes: The numbers, ascending, of at most 64; 1 is always among them.
        heads: Numbers of heads of the model.
        layer: Name of the first layer whose groups forbid the next larger number that heads allow; None where there is
            no such number.
        next_size: That number; 0 where there is none.
        columns: Inputs of that layer; 0 where there is none.
        group_size: Columns that share a scale in that layer; 0 where there is none.
    """

    sizes: tuple[int, ...]
    heads: HeadCounts
    layer: str | None = None
    next_size: int = 0
    columns: int = 0
    group_size: int = 0

    @property
    def size(self) -> int:
        """The largest number."""
        return self.sizes[-1]

    @property
    def in_words(self) -> str:
        """Say the numbers, and what allows no more: the heads, or the groups of a layer."""
        smaller = f" (smaller ones: {', '.join(map(str, self.sizes[:-1]))})" if self.size > 1 else ""
        begin = f"the largest tensor-parallel size in vLLM is {self.size}{smaller}"
        if self.layer is not None and self.group_size == PER_CHANNEL:
            return f"{begin}: the {self.columns} inputs of {self.layer} are no multiple of {self.next_size}"
        if self.layer is not None:
            has_room = self.size < _COMMON_SIZE and self.group_size > min(SERVED_GROUP_SIZES)
            more = "; a smaller group size allows more" if has_room else ""
            return (
                f"{begin}, limited by groups: {self.next_size} would cut some of {self.layer}, which has "
                f"{self.columns} inputs in groups of {self.group_size}{more}"
            )
        if self.heads.attention:
            return f"{begin}, limited by heads: the model has {self.heads.in_words}"
        return f"{begin} as far as groups decide it; its config does not say how many heads it has"


def tensor_parallel_limit(
    layers: Iterable[LinearLayer], schemes: Mapping[str, Sequence[LayerScheme]], heads: HeadCounts
) -> TensorParallelLimit:
    """Find the tensor-parallel sizes that groups of columns and heads allow.

    Args:
        layers: The layers that are quantized.
        schemes: Every scheme that each of them may get, by name.
        heads: Numbers of heads of the model.
    """
    cut: dict[tuple[int, int], str] = {}
    for layer in layers:
        if layer.stem.rpartition(".")[2] in _CUT_ALONG_INPUTS:
            group_size = max(scheme.group_size for scheme in schemes[layer.name])
            cut.setdefault((layer.columns, group_size), layer.name)
    sizes: list[int] = []
    limit: tuple[str, int, int, int] = ("", 0, 0, 0)
    for size in (size for size in range(_MOST_GPUS, 0, -1) if _heads_allow(size, heads)):
        refusing = next((key for key in cut if not _groups_allow(size, *key)), None)
        if refusing is None:
            sizes.append(size)
        elif not sizes:
            limit = (cut[refusing], size, *refusing)
    return TensorParallelLimit(tuple(reversed(sizes)), heads, limit[0] or None, *limit[1:])


def _heads_allow(size: int, heads: HeadCounts) -> bool:
    """Tell whether each GPU gets equally many heads; powers of two are tried where their number is not known."""
    if not heads.attention:
        return size & (size - 1) == 0
    shared = all(count % size == 0 if count >= size else size % count == 0 for count in heads.key_value)
    return shared and all(count % size == 0 for count in heads.attention)


def _groups_allow(size: int, columns: int, group_size: int) -> bool:
    """Tell whether the inputs on each GPU are whole groups; one scale a row is for all inputs, wherever they are."""
    return columns % (size * (1 if group_size == PER_CHANNEL else group_size)) == 0
