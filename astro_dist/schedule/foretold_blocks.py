"""Which block each worker will probably open next, so that it can read the weights while it is at the one before."""

from collections.abc import Sequence

__all__ = ["ForetoldBlocks"]


class ForetoldBlocks:
    """Foretells the next block of the source of each worker that is at one. Nothing but time hangs on it."""

    def __init__(self) -> None:
        """Begin with no worker."""
        self._by_worker: dict[int, int] = {}

    def foretell(self, worker: int, waiting: Sequence[int]) -> int | None:
        """Say which block a worker will open when it is done with the one that it has now.

        Workers are expected to end in the order in which they began, and to take the waiting blocks in their order.

        Args:
            worker: Number of the worker.
            waiting: Indices of the blocks that wait for a worker, in order; any other number for what is no block.

        Returns:
            Index of the block; None where none will be left.
        """
        self._by_worker.pop(worker, None)
        before = len(self._by_worker)
        if before >= len(waiting):
            return None
        self._by_worker[worker] = waiting[before]
        return waiting[before]

    def told(self, worker: int) -> int | None:
        """Return what was foretold for a worker since it went on last; None where nothing was.

        Args:
            worker: Number of the worker.
        """
        return self._by_worker.get(worker)

    def take(self, worker: int) -> int | None:
        """Return what was foretold for a worker, and forget it, because the worker goes on now or is lost.

        Args:
            worker: Number of the worker.
        """
        return self._by_worker.pop(worker, None)
