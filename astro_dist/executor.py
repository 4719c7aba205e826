"""How the driver reaches its workers, and the executor that has them all in its own process."""

import dataclasses
from collections import deque
from typing import Any, Protocol

from astro_dist.actors import Worker
from astro_dist.schedule import Call
from astro_dist.stage import WorkerSpec

__all__ = ["Event", "Executor", "Failed", "Joined", "LocalExecutor", "Returned"]


@dataclasses.dataclass(frozen=True)
class Joined:
    """A worker is up and free."""

    worker: int


@dataclasses.dataclass(frozen=True)
class Returned:
    """A worker's call returned; the worker is free again."""

    worker: int
    result: Any


@dataclasses.dataclass(frozen=True)
class Failed:
    """A worker's call, or its start, raised. The worker is gone and another one will join in its place.

    A worker that raised is not used again: a device may be in a state that only a new process leaves.

    Attributes:
        worker: number.
        error: what was raised, or says how the worker was lost.
        lost: whether the worker itself died or was cut off.
    """

    worker: int
    error: Exception
    lost: bool


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


class LocalExecutor:
    """Workers in this process, called in turn: for tests and debugging, and the reference for every other executor."""

    enforces_deadlines = False

    def __init__(self, num_workers: int, on_gpu: bool = False) -> None:
        self.num_workers = num_workers
        self.has_gpus = on_gpu
        self._workers: dict[int, Worker] = {}
        self._events: deque[Event | tuple[int, Call]] = deque()
        self._busy: set[int] = set()
        self._next = 0

    def start(self, spec: WorkerSpec) -> None:
        """Build the workers."""
        self._spec = spec
        for _ in range(self.num_workers):
            self._add()

    def idle(self) -> list[int]:
        """Workers that have nothing to do."""
        return [worker for worker in self._workers if worker not in self._busy]

    def submit(self, worker: int, call: Call) -> None:
        """Note a call; it runs when it is waited for."""
        self._busy.add(worker)
        self._events.append((worker, call))

    def wait(self, timeout_s: float) -> Event | None:
        """Run the oldest call, if no worker has joined since."""
        event = self._events.popleft() if self._events else None
        if not isinstance(event, tuple):
            return event
        worker, call = event
        try:
            result = getattr(self._workers[worker], call.method)(*call.args)
        except Exception as error:
            self.discard(worker)
            return Failed(worker, error, lost=False)
        self._busy.discard(worker)
        return Returned(worker, result)

    def discard(self, worker: int) -> None:
        """Forget a worker and what it was to do, and build another."""
        del self._workers[worker]
        self._busy.discard(worker)
        self._add()

    def describe(self) -> dict[int, dict[str, Any]]:
        """What each worker says of itself."""
        return {number: worker.describe() for number, worker in self._workers.items()}

    def close(self) -> None:
        """Forget the workers."""
        self._workers.clear()
        self._events.clear()

    def _add(self) -> None:
        worker = Worker(self._spec)
        worker.prepare()
        self._workers[self._next] = worker
        self._events.append(Joined(self._next))
        self._next += 1
