"""The executor whose workers are Ray actors."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.metrics import Gauge

from astro.errors import ConfigError, RunError
from astro_dist.config.schema import ExecutionConfig
from astro_dist.evaluation.measuring_worker import BeginShare, GoOn, MeasuringSpec, MeasuringWorker
from astro_dist.execution.executor import Event, Failed, Joined, Returned
from astro_dist.execution.ray_address import require_answer, start_advice
from astro_dist.execution.termination import keep_handler
from astro_dist.planning.worker_count import machine_cpus, places
from astro_dist.report.run_figures import FIGURES, RunFigures
from astro_dist.schedule.calls import Call
from astro_dist.wording import counted
from astro_dist.worker.spec import WorkerSpec
from astro_dist.worker.worker import Worker

__all__ = ["METRIC_PREFIX", "RayExecutor", "connect"]

METRIC_PREFIX = "astro_dist_"
"""What the names of a run's metrics begin with, behind Ray's own `ray_`."""

_LOOK_AROUND_S = 5.0
"""Seconds between two looks for nodes that have joined the cluster."""
_START_AGAIN_S = 60.0
"""Seconds between the failed start of a worker and the start of the one in its place."""
_DESCRIBE_TIMEOUT_S = 30.0
_START_TIMEOUT_S = 900.0
"""Seconds in which a worker must have opened the source, counted from when its process is up."""
_TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"
"""Logger that warns at length of a token which a private cluster, closed to others, gets by itself."""
_OBJECT_STORE_BYTES = 100_000_000
"""Size of a private cluster's object store, which is hardly used: large arrays travel as files."""


@dataclasses.dataclass(frozen=True)
class _Pending:
    """Something that an actor was asked for and has not answered yet.

    Attributes:
        worker: Number of the worker.
        kind: What was asked for: that the actor is `placed`, that it has done its `start`, or a `call`.
        since: Time on the monotonic clock at which it was asked for, in seconds.
    """

    worker: int
    kind: Literal["placed", "start", "call"]
    since: float = dataclasses.field(default_factory=time.monotonic)


class RayExecutor:
    """Runs one actor, which does one call at a time, for each GPU, or for each `threads_per_worker` CPUs without GPUs.

    With `threads_per_worker: auto` GPUs decide where actors have room, and CPUs are only shared out among them: each
    actor asks Ray for one CPU, and computes with as many threads as the node with the fewest CPUs a GPU has for it.

    Ray must not restart an actor that died, because the actor has lost its open block and the driver has to know. A
    new actor is asked for in its place, and waits for room if the node is gone. With `workers: auto`, nodes that join
    are used too.

    Attributes:
        num_workers: Number of actors that are asked for at the start.
        has_gpus: Whether the workers have GPUs.
        threads: Number of CPU threads of each worker.
        enforces_deadlines: Whether it can end a call that is running, which it can.
    """

    enforces_deadlines = True

    def __init__(self, config: ExecutionConfig) -> None:
        """Connect to the cluster that the configuration names, or start a private one.

        Args:
            config: Configuration of workers and cluster.

        Raises:
            RunError: The cluster cannot be reached or started, or it has no room for a single worker.
            ConfigError: GPUs are asked for, but this machine has none.
        """
        self._config = config
        self._actors: dict[int, Any] = {}
        self._idle: set[int] = set()
        self._calls: dict[Any, _Pending] = {}
        self._next, self._looked_around = 0, time.monotonic()
        self._postponed: list[float] = []
        self._gauges: dict[str, Gauge] | None = None
        self._started_here = not ray.is_initialized()
        if self._started_here:
            connect(config)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus, cpus = (int(sum(node.get(name, 0) for node in nodes)) for name in ("GPU", "CPU"))
        self.has_gpus = config.device == "cuda" or (config.device == "auto" and gpus > 0)
        if self.has_gpus and not gpus and self._started_here and config.cluster_address is None:
            self.close()
            raise ConfigError(
                "execution.device: cuda, but Ray sees no GPU on this machine; take cpu or auto, or name a cluster "
                "(RAY_ADDRESS or execution.ray_address)"
            )
        self.threads = config.cpu_threads
        if self.has_gpus and config.threads_per_worker == "auto":
            self.threads = _cpus_per_gpu(nodes)
        self.num_workers = config.workers if isinstance(config.workers, int) else self._places()
        if not self.num_workers:
            self.close()
            raise RunError(
                f"execution.workers: auto, but the cluster has {gpus} GPUs and {cpus} CPUs on "
                f"{counted(len(nodes), 'node')}, not enough for one worker of {config.cpu_threads} CPUs"
                f"{' and one GPU' if self.has_gpus else ''}; add nodes, lower threads_per_worker, or give a number of "
                "workers for the cluster to grow to"
            )

    def start(self, spec: WorkerSpec | MeasuringSpec, kind: type[Worker | MeasuringWorker] = Worker) -> None:
        """Ask for the actors, spread over the nodes in mode `blocks`, else close together; see `Executor`.

        Args:
            spec: Everything that a worker has to know.
            kind: Class of the workers.
        """
        self._spec = spec
        self._run_name = spec.run.root.name if isinstance(spec, WorkerSpec) else ""
        # There is no runtime environment: with one, Ray would not use the processes that it has started already. Ray
        # sets OMP_NUM_THREADS to `num_cpus` itself, and the worker sets its number of threads over it.
        self._remote = ray.remote(kind).options(
            num_cpus=self._config.cpu_threads,
            num_gpus=1 if self.has_gpus else 0,
            scheduling_strategy="DEFAULT" if self._config.mode == "sequential" else "SPREAD",
            max_restarts=0,
            max_task_retries=0,
        )
        for _ in range(self.num_workers):
            self._add()

    def idle(self) -> list[int]:
        """Return the numbers of the actors that are up and have nothing to do."""
        return sorted(self._idle)

    def submit(self, worker: int, call: Call | BeginShare | GoOn) -> None:
        """Let an actor begin a call; see `Executor`."""
        self._idle.discard(worker)
        self._calls[self._actors[worker].do.remote(call)] = _Pending(worker, "call")

    def wait(self, timeout_s: float) -> Event | None:
        """Block until something happens to an actor; see `Executor`."""
        self._look_around()
        if not self._calls:
            time.sleep(timeout_s)
            return None
        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=timeout_s)
        if not ready:
            return self._give_up_start()
        pending = self._calls.pop(ready[0])
        worker, starting = pending.worker, pending.kind != "call"
        try:
            result = ray.get(ready[0])
        except RayTaskError as error:
            self._replace(worker, starting)
            return Failed(worker, _cause(error), lost=False)
        except RayError as error:
            self._replace(worker, starting)
            return Failed(worker, _explain(error), lost=True)
        if pending.kind == "placed":
            # The first worker has everything to embed, for which it need not have compiled; the others wait for that.
            self._calls[self._actors[worker].prepare.remote(warms_up=worker > 0)] = _Pending(worker, "start")
            return None
        self._idle.add(worker)
        return Joined(worker) if starting else Returned(worker, result)

    def discard(self, worker: int) -> None:
        """Kill an actor, wherever it is, and ask for another one; see `Executor`."""
        self._remove(worker)
        self._add()

    def describe(self) -> dict[int, dict[str, Any]]:
        """Ask each idle worker where it runs and how much memory it used; see `Executor`.

        A worker that dies meanwhile is left out.
        """
        references = {worker: self._actors[worker].describe.remote() for worker in self.idle()}
        descriptions = {}
        for worker, reference in references.items():
            with contextlib.suppress(RayError):
                descriptions[worker] = ray.get(reference, timeout=_DESCRIBE_TIMEOUT_S)
        return descriptions

    def report(self, figures: RunFigures) -> None:
        """Set a gauge of Ray's metrics for each figure, tagged with the name of the run directory; see `Executor`."""
        if self._gauges is None:
            self._gauges = {
                name: Gauge(f"{METRIC_PREFIX}{name}", description, ("run",)) for name, description in FIGURES.items()
            }
        for name, value in figures.numbers().items():
            self._gauges[name].set(value, {"run": self._run_name})

    def close(self) -> None:
        """End the actors, and the cluster if it is a private one."""
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors, self._calls = {}, {}
        if self._started_here:
            ray.shutdown()

    def _remove(self, worker: int) -> None:
        ray.kill(self._actors.pop(worker))
        self._idle.discard(worker)
        self._calls = {reference: call for reference, call in self._calls.items() if call.worker != worker}

    def _add(self) -> None:
        worker, self._next = self._next, self._next + 1
        self._actors[worker] = self._remote.remote(self._spec)
        self._calls[self._actors[worker].is_up.remote()] = _Pending(worker, "placed")

    def _give_up_start(self) -> Event | None:
        """End a worker that hangs at its start, perhaps because its node does not reach the source."""
        due = time.monotonic() - _START_TIMEOUT_S
        late = next((call for call in self._calls.values() if call.kind == "start" and call.since < due), None)
        if late is None:
            return None
        self._replace(late.worker, starting=True)
        return Failed(late.worker, RunError(f"did not open the source within {_START_TIMEOUT_S:.0f} s"), lost=True)

    def _replace(self, worker: int, starting: bool) -> None:
        """Ask for another actor. Where one could not start, another one cannot either, so that waits for a while."""
        self._remove(worker)
        if starting:
            self._postponed.append(time.monotonic() + _START_AGAIN_S)
        else:
            self._add()

    def _places(self) -> int:
        """Number of workers that the nodes have room for while nothing else runs on them."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return places(nodes, self._config.cpu_threads, self.has_gpus)

    def _look_around(self) -> None:
        """Start again what could not start, and use nodes that have joined."""
        now = time.monotonic()
        due = [moment for moment in self._postponed if moment <= now]
        self._postponed = [moment for moment in self._postponed if moment > now]
        missing = len(due)
        if self._config.workers == "auto" and now - self._looked_around > _LOOK_AROUND_S:
            self._looked_around = now
            missing = max(missing, self._places() - len(self._actors) - len(self._postponed))
        for _ in range(missing):
            self._add()


def _cpus_per_gpu(nodes: Sequence[Mapping[str, float]]) -> int:
    """Return how many CPUs every node has for each of its GPUs, at least 1. Nodes are given by their resources."""
    shares = [int(node.get("CPU", 0) // node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1]
    return max(min(shares, default=1), 1)


def connect(config: ExecutionConfig) -> None:
    """Connect this process to the cluster that a configuration names, or start a private one.

    Args:
        config: Configuration of workers and cluster.

    Raises:
        RunError: The cluster cannot be reached or started.
    """
    address = config.cluster_address
    require_answer(config)
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if address:
        options["address"] = address
    else:
        logging.getLogger(_TOKEN_LOGGER).setLevel(logging.ERROR)
        options |= {
            "address": "local",
            "num_cpus": machine_cpus(config),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        with keep_handler():
            ray.init(**options)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        place, advice = address or "on this machine", start_advice(address, error)
        raise RunError(f"Ray cluster {place}: cannot be reached or started: {error}{advice}") from error


def _cause(error: RayTaskError) -> Exception:
    """The error that the call raised."""
    return error.cause if isinstance(error.cause, Exception) else RunError(" ".join(str(error).split()))


def _explain(error: RayError) -> RunError:
    """An error that says how a worker was lost. The first line of Ray's message says which process ended, and how."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return RunError(f"the worker died ({first})" if isinstance(error, RayActorError) else first)
