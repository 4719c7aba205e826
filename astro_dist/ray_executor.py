"""Workers as Ray actors. The only file that knows Ray."""

import logging
import os
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from astro.errors import AstroError, RunError
from astro_dist.actors import Worker
from astro_dist.config import ExecutionConfig
from astro_dist.schedule import Call
from astro_dist.stage import WorkerSpec

__all__ = ["RayExecutor"]

_START_TIMEOUT_S = 600
_OBJECT_STORE_BYTES = 100_000_000
"""Of a private cluster: large arrays travel as files, so next to nothing lies in the object store."""


class RayExecutor:
    """One single-threaded actor a GPU, or for each `threads_per_worker` CPUs where there is none.

    Attributes:
        num_workers: actors.
        has_gpus: whether the cluster has GPUs.
    """

    def __init__(self, config: ExecutionConfig) -> None:
        """Connect to the cluster that the configuration names, or start a private one.

        Raises:
            RunError: no cluster can be reached.
        """
        self._config = config
        self._actors: list[Any] = []
        self._running: dict[Any, tuple[int, Call]] = {}
        self._started_here = not ray.is_initialized()
        if self._started_here:
            _connect(config)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus, cpus = (int(sum(node.get(name, 0) for node in nodes)) for name in ("GPU", "CPU"))
        self.has_gpus = config.device == "cuda" or (config.device == "auto" and gpus > 0)
        found = sum(self._places(node) for node in nodes)
        self.num_workers = config.workers if isinstance(config.workers, int) else found
        if self.num_workers > found or not found:
            self.close()
            raise RunError(
                f"execution.workers: {self.num_workers} asked for, but the cluster has {gpus} GPUs and {cpus} CPUs on "
                f"{len(nodes)} node(s), enough for {found} workers of {config.threads_per_worker} CPUs"
                f"{' and one GPU' if self.has_gpus else ''}; add nodes, or lower workers or threads_per_worker"
            )

    def start(self, spec: WorkerSpec) -> None:
        """Create the actors, spread over the nodes, and wait until each is up."""
        threads = str(spec.threads)
        # Read when the libraries load, so before the actor's own code could set them.
        variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        options = {
            "num_cpus": spec.threads,
            "num_gpus": 1 if self.has_gpus else 0,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": variables},
            # A worker that died is not revived behind the driver's back: it lost its open block.
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        remote = ray.remote(Worker).options(**options)
        self._actors = [remote.remote(spec) for _ in range(self.num_workers)]
        starting = [actor.prepare.remote() for actor in self._actors]
        up, waiting = ray.wait(starting, num_returns=len(starting), timeout=_START_TIMEOUT_S)
        for index, reference in enumerate(starting):
            if reference in up:
                _get(reference, f"starting worker {index}")
        if waiting:
            raise RunError(
                f"{len(waiting)} of {len(starting)} workers did not start within {_START_TIMEOUT_S} s; another job may "
                "hold the cluster's CPUs or GPUs (see `ray status`). What is finished is kept"
            )

    def _places(self, node: dict[str, float]) -> int:
        """Workers that a node has room for."""
        places = int(node.get("CPU", 0)) // self._config.threads_per_worker
        return min(places, int(node.get("GPU", 0))) if self.has_gpus else places

    def submit(self, worker: int, call: Call) -> None:
        """Let a worker begin a call."""
        reference = getattr(self._actors[worker], call.method).remote(*call.args)
        self._running[reference] = (worker, call)

    def wait(self) -> tuple[int, Any]:
        """Block until some call returns.

        Raises:
            RunError: the worker died.
            AstroError: what the call raised.
        """
        (reference, *_), _ = ray.wait(list(self._running), num_returns=1)
        worker, call = self._running.pop(reference)
        return worker, _get(reference, f"{call.unit}, {call.method} on worker {worker}")

    def describe(self) -> list[dict[str, Any]]:
        """What each worker says of itself."""
        return [_get(actor.describe.remote(), f"starting worker {index}") for index, actor in enumerate(self._actors)]

    def close(self) -> None:
        """End the actors, and the cluster where it is a private one."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._running = [], {}
        if self._started_here:
            ray.shutdown()


def _connect(config: ExecutionConfig) -> None:
    address = os.environ.get("RAY_ADDRESS") if config.ray_address == "auto" else config.ray_address
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if address:
        options["address"] = address
    else:
        workers = config.workers if isinstance(config.workers, int) else 0
        cpus = max(os.cpu_count() or 1, workers * config.threads_per_worker)
        options |= {
            "address": "local",
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        ray.init(**options)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(f"Ray cluster {address or 'on this machine'}: cannot be reached or started: {error}") from error


def _get(reference: Any, what: str) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, AstroError):
            raise cause from None
        raise RunError(f"{what}: {cause!r}. What is finished is kept; run the same command to go on") from error
    except RayActorError as error:  # its first line says which process ended and how
        raise RunError(
            f"{what}: the worker died ({str(error).splitlines()[0]}), often for want of memory. "
            "What is finished is kept; run the same command to go on"
        ) from error
    except RayError as error:
        raise RunError(f"{what}: {str(error).splitlines()[0]}. What is finished is kept") from error
