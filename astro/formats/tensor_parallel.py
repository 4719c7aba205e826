"""Over how many GPUs vLLM can cut the layers of a quantized model (tensor parallelism).

Layers that end a part of a block are cut along their inputs, and no group of columns may be cut in two: the inputs on
each GPU have to be a multiple of the group size. Read in the source of vLLM 0.32 (`CompressedTensorsWNA16`,
`CompressedTensorsWNA16MoEMethod`), for dense layers and experts alike. Experts may be spread whole instead
(`--enable-expert-parallel`).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from astro.config import PER_CHANNEL, LayerScheme
from astro.model.linear_layer import LinearLayer

__all__ = ["TensorParallelLimit", "tensor_parallel_limit"]

_CUT_ALONG_INPUTS = (
    "o_proj", "down_proj", "w2", "out_proj", "wo", "dense", "dense_4h_to_h", "fc2", "c_proj", "output_linear", "fc_out",
)  # fmt: skip
"""Last parts of the names of layers that vLLM cuts along their inputs."""
_COMMON_SIZE = 8
"""GPUs of most machines that serve large models; a smaller limit deserves advice."""
_SIZES = (64, 32, 16, 8, 4, 2, 1)
"""Numbers of GPUs that are tried, powers of two as in nearly all machines."""


@dataclasses.dataclass(frozen=True)
class TensorParallelLimit:
    """The largest number of GPUs over which vLLM can cut every layer.

    Attributes:
        size: The number, a power of two of at most 64.
        layer: Name of the first layer that allows no more; None where no layer limits it.
        columns: Inputs of that layer; 0 where no layer limits it.
        group_size: Columns that share a scale in that layer; 0 where no layer limits it.
    """

    size: int
    layer: str | None = None
    columns: int = 0
    group_size: int = 0

    @property
    def in_words(self) -> str:
        """Say the number, and which layer allows no more."""
        if self.layer is None:
            return f"its groups allow a tensor-parallel size of {self.size} in vLLM"
        groups = self.columns // self.group_size
        more = "; a smaller group size allows more" if self.size < _COMMON_SIZE else ""
        return (
            f"the largest tensor-parallel size in vLLM is {self.size}: {self.layer} has {self.columns} inputs, "
            f"{groups} groups of {self.group_size}{more}"
        )


def tensor_parallel_limit(
    layers: Iterable[LinearLayer], schemes: Mapping[str, Sequence[LayerScheme]]
) -> TensorParallelLimit:
    """Find the largest tensor-parallel size, as far as groups of columns decide it.

    Args:
        layers: The layers that are quantized.
        schemes: Every scheme that each of them may get, by name.
    """
    limit = TensorParallelLimit(_SIZES[0])
    for layer in layers:
        group_size = max(scheme.group_size for scheme in schemes[layer.name])
        if group_size == PER_CHANNEL or layer.stem.rpartition(".")[2] not in _CUT_ALONG_INPUTS:
            continue
        size = next(size for size in _SIZES if layer.columns % (size * group_size) == 0)
        if size < limit.size:
            limit = TensorParallelLimit(size, layer.name, layer.columns, group_size)
    return limit
