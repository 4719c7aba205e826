"""The executor: how the driver reaches its workers, and what happens to them."""

import dataclasses
from typing import Any, Protocol

from astro_dist.report.run_figures import RunFigures
from astro_dist.schedule.calls import Call, Result
from astro_dist.worker.spec import WorkerSpec

__all__ = ["Event", "Executor", "Failed", "Joined", "Returned"]


@dataclasses.dataclass(frozen=True)
class Joined:
    """A worker is up and free.

    Attributes:
        worker: Number of the worker.
    """

    worker: int


@dataclasses.dataclass(frozen=True)
class Returned:
    """A worker's call returned, and the worker is free again.

    Attributes:
        worker: Number of the worker.
        result: Result of the call.
    """

    worker: int
    result: Result


@dataclasses.dataclass(frozen=True)
class Failed:
    """A worker's call, or its start, raised an error, and the worker is gone. Usually another one joins in its place.

    A worker that raised an error is not used again: its device may be in a state that only a new process leaves.

    Attributes:
        worker: Number of the worker.
        error: Error that was raised, or one that says how the worker was lost.
        lost: Whether the worker itself died or was cut off.
        replaced: Whether another worker will join in its place.
    """

    worker: int
    error: Exception
    lost: bool
    replaced: bool = True


Event = Joined | Returned | Failed


class Executor(Protocol):
    """Runs workers that each do one call at a time. A worker's number is never given to another worker.

    Attributes:
        num_workers: Number of workers that it aims at.
        has_gpus: Whether the workers compute on GPUs.
        threads: Number of CPU threads of each worker.
        enforces_deadlines: Whether it can end a call that is running.
    """

    num_workers: int
    has_gpus: bool
    threads: int
    enforces_deadlines: bool

    def start(self, spec: WorkerSpec) -> None:
        """Begin to bring up the workers. Each joins when it is up.

        Args:
            spec: Everything that a worker has to know of the run.
        """

    def idle(self) -> list[int]:
        """Return the numbers of the workers that are up and have nothing to do."""

    def submit(self, worker: int, call: Call) -> None:
        """Let an idle worker begin a call.

        Args:
            worker: Number of the worker.
            call: Call that the worker does.
        """

    def wait(self, timeout_s: float) -> Event | None:
        """Block until something happens to a worker.

        Args:
            timeout_s: Longest time to wait, in seconds.

        Returns:
            The oldest event that was not returned yet; None where nothing happened for so long.
        """

    def discard(self, worker: int) -> None:
        """End a worker, whatever it does. Another one joins in its place.

        Args:
            worker: Number of the worker.
        """

    def describe(self) -> dict[int, dict[str, Any]]:
        """Ask each idle worker where it runs and how much memory it used.

        Returns:
            The keyword arguments of `BlockResult` that say so, by number of the worker.
        """

    def report(self, figures: RunFigures) -> None:
        """Let those who watch the executor's workers see how far the run is, where anybody can.

        Args:
            figures: Figures of this moment.
        """

    def close(self) -> None:
        """End the workers. What they were doing is lost."""
