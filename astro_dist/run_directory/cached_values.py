"""The largest keys and values that calibration saw in each attention, and the scales of an FP8 cache that follow.

Every forward writes what it saw into a file that is named after its content. The largest of all files counts, so that
it does not matter which worker wrote a file, how often, or in which order, and nothing has to be added up.
"""

import hashlib
import json
from collections.abc import Mapping

from astro.errors import DamagedError
from astro.model.kv_cache import CacheScales, LargestCached
from astro.storage.atomic import write_json
from astro_dist.run_directory.layout import RunLayout
from astro_dist.run_directory.records import read_own_json
from astro_dist.schedule.names import block_unit

__all__ = ["read_scales", "write_largest"]


def write_largest(run: RunLayout, round_index: int, block: int, largest: Mapping[str, LargestCached]) -> None:
    """Write what a forward of a block saw.

    Args:
        run: Layout of the run directory.
        round_index: Index of the round whose scales follow from it.
        block: Index of the block.
        largest: Largest magnitudes by the attention module's name in the model.
    """
    content = {name: [of_module.key, of_module.value] for name, of_module in sorted(largest.items())}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    path = run.cached(block_unit(round_index, block)) / f"{digest}.json"
    if not path.exists():
        write_json(path, content)


def read_scales(run: RunLayout, round_index: int, block: int) -> dict[str, CacheScales]:
    """Return the scales of a block's attention by its name in the model; empty where nothing was seen.

    Args:
        run: Layout of the run directory.
        round_index: Index of the round.
        block: Index of the block, whose statistics are complete.

    Raises:
        DamagedError: A file is not as it was written.
    """
    largest: dict[str, LargestCached] = {}
    for path in sorted(run.cached(block_unit(round_index, block)).glob("*.json")):
        content = read_own_json(path)
        if hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16] != path.stem:
            raise DamagedError(path, "its content is not what its name says")
        for name, (key, value) in content.items():
            seen = LargestCached(key, value)
            largest[name] = largest[name] | seen if name in largest else seen
    return {name: of_module.scales for name, of_module in largest.items()}
