"""How the driver reaches its workers, and the executor that has them all in its own process."""

from collections import deque
from typing import Any, Protocol

from astro_dist.actors import Worker
from astro_dist.schedule import Call
from astro_dist.stage import WorkerSpec

__all__ = ["Executor", "LocalExecutor"]


class Executor(Protocol):
    """Workers that each do one call at a time."""

    num_workers: int
    has_gpus: bool

    def start(self, spec: WorkerSpec) -> None:
        """Bring up the workers."""

    def submit(self, worker: int, call: Call) -> None:
        """Let a worker that has nothing to do begin a call."""

    def wait(self) -> tuple[int, Any]:
        """Block until some call returns; its worker and result. An error of the call is raised here."""

    def describe(self) -> list[dict[str, Any]]:
        """What each worker says of itself."""

    def close(self) -> None:
        """End the workers; what they were doing is lost."""


class LocalExecutor:
    """Workers in this process, called in turn: for tests and debugging, and the reference for every other executor."""

    def __init__(self, num_workers: int, on_gpu: bool = False) -> None:
        self.num_workers = num_workers
        self.has_gpus = on_gpu
        self._workers: list[Worker] = []
        self._calls: deque[tuple[int, Call]] = deque()

    def start(self, spec: WorkerSpec) -> None:
        """Build the workers."""
        self._workers = [Worker(spec) for _ in range(self.num_workers)]
        for worker in self._workers:
            worker.prepare()

    def submit(self, worker: int, call: Call) -> None:
        """Note a call; it runs when it is waited for."""
        self._calls.append((worker, call))

    def wait(self) -> tuple[int, Any]:
        """Run the oldest call."""
        worker, call = self._calls.popleft()
        return worker, getattr(self._workers[worker], call.method)(*call.args)

    def describe(self) -> list[dict[str, Any]]:
        """What each worker says of itself."""
        return [worker.describe() for worker in self._workers]

    def close(self) -> None:
        """Forget the workers."""
        self._workers.clear()
        self._calls.clear()
