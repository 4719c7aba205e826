"""The calls by which several workers solve a block: for each batch a merge, then tiles of its sample, then of its rows.

Where errors are corrected, a last call does so for all rows together. A batch consists of input groups that are solved
side by side.
"""

from collections.abc import Callable, Iterable

from astro_dist.schedule.calls import BatchParts, MergeHessians, PartCall, Reconstruct, SolveRows, TryBetas

__all__ = ["PendingCalls"]


class PendingCalls:
    """Keeps track of the calls that some batches of a block still take.

    Attributes:
        left: Calls that can be made or are being made, the oldest first. Only the keys count.
        unmerged: Number of batches whose Hessians are not merged.
    """

    def __init__(self, place: tuple[int, int], batches: Iterable[BatchParts]) -> None:
        """Begin with a call that merges, for each batch.

        Args:
            place: Index of the round, and of the block.
            batches: Numbers of calls that each batch takes after its merge.
        """
        self._place = place
        self._later = {parts.batch: self._phases(parts) for parts in batches}
        self._running = dict.fromkeys(self._later, 1)
        self.left: dict[PartCall, None] = {MergeHessians(*place, batch): None for batch in self._later}
        self.unmerged = len(self.left)

    @property
    def batches(self) -> list[int]:
        """Return the index of every batch."""
        return list(self._later)

    def done(self, call: PartCall) -> None:
        """Take note that a call returned. Where it was the last of its phase, the calls of the next phase can be made.

        Args:
            call: Call that returned; one of `left`.
        """
        del self.left[call]
        self.unmerged -= isinstance(call, MergeHessians)
        self._running[call.batch] -= 1
        if not self._running[call.batch] and self._later[call.batch]:
            calls = self._later[call.batch].pop(0)
            self._running[call.batch] = len(calls)
            self.left |= dict.fromkeys(calls)

    def _phases(self, parts: BatchParts) -> list[list[PartCall]]:
        """The calls of a batch after its merge, by phase. All calls of a phase return before the next phase begins."""
        kinds: list[tuple[Callable[[int, int, int, int], PartCall], int]] = [
            (TryBetas, parts.sample_tiles),
            (SolveRows, parts.tiles),
        ]
        phases = [[kind(*self._place, parts.batch, tile) for tile in range(n)] for kind, n in kinds if n]
        return [*phases, [Reconstruct(*self._place, parts.batch)]] if parts.is_corrected else phases
