"""How the driver reaches its workers, and the executor that has them all in its own process."""

import dataclasses
from typing import Any, Protocol

from astro_dist.schedule.calls import Call, Result
from astro_dist.worker.spec import WorkerSpec

__all__ = ["Event", "Executor", "Failed", "Joined", "Returned"]


@dataclasses.dataclass(frozen=True)
class Joined:
    """A worker is up and free."""

    worker: int


@dataclasses.dataclass(frozen=True)
class Returned:
    """A worker's call returned; the worker is free again."""

    worker: int
    result: Result


@dataclasses.dataclass(frozen=True)
class Failed:
    """A worker's call, or its start, raised. The worker is gone; mostly another one will join in its place.

    A worker that raised is not used again: a device may be in a state that only a new process leaves.

    Attributes:
        worker: Number of the worker.
        error: What was raised, or says how the worker was lost.
        lost: Whether the worker itself died or was cut off.
        replaced: Whether another worker will join in its place.
    """

    worker: int
    error: Exception
    lost: bool
    replaced: bool = True


Event = Joined | Returned | Failed


class Executor(Protocol):
    """Workers that each do one call at a time. A worker's number is never given to another one."""

    num_workers: int
    has_gpus: bool
    enforces_deadlines: bool
    """Whether a call can be ended from outside."""

    def start(self, spec: WorkerSpec) -> None:
        """Begin to bring up the workers; each joins when it is up."""

    def idle(self) -> list[int]:
        """Workers that are up and have nothing to do."""

    def submit(self, worker: int, call: Call) -> None:
        """Let an idle worker begin a call."""

    def wait(self, timeout_s: float) -> Event | None:
        """Block until something happens; None where nothing did for so long."""

    def discard(self, worker: int) -> None:
        """End a worker, whatever it does; another one will join in its place."""

    def describe(self) -> dict[int, dict[str, Any]]:
        """What each worker that is idle says of itself."""

    def close(self) -> None:
        """End the workers; what they were doing is lost."""
