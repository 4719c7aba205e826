"""What servers would cache of the block that a worker holds: how large its keys and values are, and how they round."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from astro.model.cache_scales import CacheScales, LargestByModule, LargestCached
from astro.model.kv_cache import caching_modules, rounded_cache, watched_cache
from astro.model.skeleton import Skeleton
from astro_dist.run_directory.unit_record import BlockResult
from astro_dist.schedule.names import block_unit, round_of_stream
from astro_dist.worker.spec import WorkerSpec

__all__ = ["BlockCache"]


class BlockCache:
    """Measures and rounds the keys and values of a loaded block, where servers hold them in FP8.

    Attributes:
        is_rounded: Whether servers do.
    """

    def __init__(self, spec: WorkerSpec, skeleton: Skeleton) -> None:
        """Begin without a block.

        Args:
            spec: What the worker was built from.
            skeleton: The model, whose blocks are loaded by somebody else.
        """
        self.is_rounded = spec.activations.rounds_cache
        self._run, self._skeleton = spec.run, skeleton
        self._recorded: tuple[tuple[str, int], Mapping[str, CacheScales]] | None = None

    def forget(self) -> None:
        """Let go of what was read for a block, which is taken off the device."""
        self._recorded = None

    @contextmanager
    def watching(self, index: int, largest: LargestByModule, rounds: bool = False) -> Iterator[Callable[[], bool]]:
        """Note the largest keys and values of a block in the body of a `with` statement, if servers round them.

        Args:
            index: Index of the block, which is loaded.
            largest: Largest magnitudes, which grow.
            rounds: Whether the block computes with rounded ones already, see `watched_cache`.

        Yields:
            A function that tells whether every attention of the block was seen.
        """
        if not self.is_rounded:
            yield lambda: True
            return
        block, seen = self._skeleton.blocks[index], set[nn.Module]()
        names = {module: name for name, module in block.named_modules(prefix=f"{self._skeleton.blocks_name}.{index}")}
        caching = caching_modules(block)  # reads source code, and the function is called at every layer

        def note(module: nn.Module, cached: LargestCached) -> None:
            seen.add(module)
            largest.add_(names[module], cached)

        with watched_cache(note, rounds):
            yield lambda: seen.issuperset(caching)

    def rounding(self, scales: Mapping[str, CacheScales]) -> AbstractContextManager[None]:
        """Return a context in which loaded blocks round keys and values as servers do.

        Args:
            scales: Scales by the attention module's name in the model; keys and values of others stay as they are.
        """
        return rounded_cache({self._skeleton.model.get_submodule(name): each for name, each in scales.items()})

    def recorded_scales(self, stream: str, index: int) -> Mapping[str, CacheScales]:
        """Return the scales of a finished block by the attention module's name in the model.

        Args:
            stream: Stream of the model; there are none in that of the source, which rounds nothing.
            index: Index of the block.

        Raises:
            DamagedError: The record of the block cannot be read.
            RunError: The record does not tell the scales.
        """
        wrote = round_of_stream(stream)
        if wrote is None or not self.is_rounded:
            return {}
        if self._recorded is None or self._recorded[0] != (stream, index):
            unit = block_unit(wrote, index)
            self._recorded = ((stream, index), self._run.read(unit, BlockResult).require_cache_scales(unit))
        return self._recorded[1]
