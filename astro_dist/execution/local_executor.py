"""The executor whose workers are all in this process."""

import os
import traceback
from collections import deque
from typing import Any, Literal

import torch

from astro_dist.execution.executor import Event, Failed, Joined, Returned
from astro_dist.report.run_figures import RunFigures
from astro_dist.schedule.calls import Call
from astro_dist.worker.device_check import takes_gpu
from astro_dist.worker.spec import WorkerSpec
from astro_dist.worker.worker import Worker

__all__ = ["LocalExecutor"]


class LocalExecutor:
    """Runs workers in this process, one call after the other. It is the reference for every other executor.

    Attributes:
        num_workers: Number of workers.
        has_gpus: Whether the workers compute on the GPU of this machine.
        threads: Number of CPU threads that the workers, one at a time, compute with.
        enforces_deadlines: Whether it can end a call that is running, which it cannot.
    """

    enforces_deadlines = False

    def __init__(
        self,
        num_workers: int,
        threads: int | Literal["auto"] = "auto",
        device: Literal["auto", "cpu", "cuda"] = "cpu",
    ) -> None:
        """Prepare to run workers; none is built.

        Args:
            num_workers: Number of workers.
            threads: Number of CPU threads of each worker; `auto` as in the configuration.
            device: Kind of device that the workers compute on; `auto` is a GPU where this machine has one.

        Raises:
            ConfigError: This machine has a GPU that torch cannot use, or has none although one is asked for.
        """
        self.num_workers = num_workers
        self.has_gpus = takes_gpu(device)
        share = (os.cpu_count() or 1) // max(torch.cuda.device_count(), 1) if self.has_gpus else 1
        self.threads = max(share, 1) if threads == "auto" else threads
        self._workers: dict[int, Worker] = {}
        self._events: deque[Event | tuple[int, Call]] = deque()
        self._busy: set[int] = set()
        self._next = 0

    def start(self, spec: WorkerSpec) -> None:
        """Build the workers; see `Executor`."""
        self._spec = spec
        for _ in range(self.num_workers):
            self._add(self._build())

    def idle(self) -> list[int]:
        """Return the numbers of the workers that have nothing to do."""
        return [worker for worker in self._workers if worker not in self._busy]

    def submit(self, worker: int, call: Call) -> None:
        """Take note of a call, which runs when it is waited for; see `Executor`."""
        self._busy.add(worker)
        self._events.append((worker, call))

    def wait(self, timeout_s: float) -> Event | None:
        """Return the oldest event, or run the oldest call if that is older; see `Executor`."""
        event = self._events.popleft() if self._events else None
        if not isinstance(event, tuple):
            return event
        worker, call = event
        try:
            result = self._workers[worker].do(call)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # tensors in them would take the memory of the next worker
            self.discard(worker)
            return Failed(worker, error, lost=False)
        self._busy.discard(worker)
        return Returned(worker, result)

    def discard(self, worker: int) -> None:
        """Drop a worker and build another one, or note `Failed` if it cannot be built; see `Executor`."""
        del self._workers[worker]
        self._busy.discard(worker)
        try:
            replacement = self._build()
        except Exception as error:  # whatever it is, it must not hide why the first worker is gone
            self._events.append(Failed(self._next, error, lost=False, replaced=False))
            self._next += 1
        else:
            self._add(replacement)

    def describe(self) -> dict[int, dict[str, Any]]:
        """Ask each worker where it runs and how much memory it used; see `Executor`."""
        return {number: worker.describe() for number, worker in self._workers.items()}

    def report(self, figures: RunFigures) -> None:
        """Do nothing: nobody watches this process but by the display; see `Executor`."""

    def close(self) -> None:
        """Drop the workers."""
        self._workers.clear()
        self._events.clear()

    def _build(self) -> Worker:
        worker = Worker(self._spec)
        worker.prepare()
        return worker

    def _add(self, worker: Worker) -> None:
        self._workers[self._next] = worker
        self._events.append(Joined(self._next))
        self._next += 1
