"""A block whose layers are all solved, and what is recorded of it beside its files."""

import dataclasses
from collections.abc import Mapping, Sequence

from astro.model.cache_scales import CacheScales
from astro.quantization.grid import QuantizedLinear
from astro.quantization.layer_record import LayerRecord
from astro_dist.run_directory.tuning import Tuning

__all__ = ["SolvedBlock"]


@dataclasses.dataclass(frozen=True)
class SolvedBlock:
    """A block that is ready to be written.

    Attributes:
        layers: Every quantized layer by name.
        records: Record of each input group.
        seconds: Time by phase that all but the solves of the input groups took.
        cache_scales: Scales of an FP8 cache by the attention module's name in the model; empty where none is rounded.
        tuning: What came of tuning the scales; None where it was not asked for.
    """

    layers: Mapping[str, QuantizedLinear]
    records: Sequence[LayerRecord]
    seconds: Mapping[str, float]
    cache_scales: Mapping[str, CacheScales]
    tuning: Tuning | None = None
