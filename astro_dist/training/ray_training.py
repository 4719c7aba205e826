"""Training with Ray Train: workers on a cluster, checkpoints that survive them."""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from astro.errors import AstroError, ConfigError, DamagedError, DivergedError, RunError, StorageError
from astro.process import configure_process, set_allocator
from astro_dist.config.schema import ExecutionConfig
from astro_dist.config.training import TrainConfig
from astro_dist.execution.ray_executor import connect
from astro_dist.training.checkpoint import lasts, writing
from astro_dist.training.loop import Outlet, Trainer
from astro_dist.training.parallel import Place
from astro_dist.training.token_file import TokenFile
from astro_dist.training.training_directory import CHECKPOINTS, TrainingDirectory
from astro_dist.training.watched import run_watched
from astro_dist.wording import counted

__all__ = ["train_with_ray"]


_START_ATTEMPTS = 30
"""How often workers are begun where nodes are missing, say because one was lost. Ray Train waits a minute each time,
and would go on for ever."""


def train_with_ray(config: TrainConfig, tokens: TokenFile, run: TrainingDirectory, look: Callable[[], None]) -> None:
    """Train on the workers of a cluster, from the last checkpoint if there is one.

    Args:
        config: Configuration of the training.
        tokens: Tokens of the text, in a file that every node sees.
        run: Run directory.
        look: Function that is called again and again while workers train.

    Raises:
        ConfigError: The cluster has too few CPUs or GPUs, or the training was begun by another executor.
        RunError: The cluster cannot be reached, or workers failed more often than `max_retries`.
        AstroError: What ended a worker for good.
    """
    execution = config.execution
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    started_here = not ray.is_initialized()
    if started_here:
        connect(
            ExecutionConfig(
                workers=execution.workers,
                threads_per_worker=execution.threads_per_worker,
                ray_address=execution.ray_address,
            )
        )
    try:
        run.require_executor("ray")
        trainer = _trainer(config, tokens, run)

        def fit() -> None:
            try:
                trainer.fit()
            except Exception as error:
                raise _explained(error) from error

        # A private cluster, or this process's place on another one, ends its workers when it is left.
        run_watched(fit, look, run.stop, awaits_end=not started_here)
    finally:
        if started_here:
            ray.shutdown()


def _trainer(config: TrainConfig, tokens: TokenFile, run: TrainingDirectory) -> Any:
    execution, output = config.execution, config.output
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    if execution.device == "cuda" and not has_gpus:
        raise ConfigError("execution.device: cuda, but the cluster has no GPU; take cpu or auto, or another cluster")
    use_gpu = has_gpus and execution.device != "cpu"
    wanted = {"CPU": execution.threads_per_worker, **({"GPU": 1} if use_gpu else {})}
    _require_room(execution.workers, wanted)
    return ray.train.torch.TorchTrainer(
        _train_on_worker,
        train_loop_config={"config": config, "tokens": tokens, "run": run},
        scaling_config=ray.train.ScalingConfig(
            num_workers=execution.workers,
            use_gpu=use_gpu,
            resources_per_worker=wanted,
        ),
        # What workers agree on is on their CPUs, so that no GPU is waited for.
        torch_config=ray.train.torch.TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
        # Ray Train goes on from the newest checkpoint below a name that it finds again.
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=str(run.root),
            # The types that Ray ships are those of its first Ray Train, which had no such limit.
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                max_failures=execution.max_retries, controller_failure_limit=_START_ATTEMPTS
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=output.keep_checkpoints),
        ),
    )


def _require_room(workers: int, wanted: Mapping[str, int]) -> None:
    """Refuse a cluster that is too small, for which Ray Train would wait without a word."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(node.get(name, 0) // each) for name, each in wanted.items()) for node in nodes)
    if room < workers:
        each = " and ".join(counted(number, name) for name, number in wanted.items())
        raise ConfigError(
            f"execution.workers: {workers}, each with {each} of one node, and the cluster has room for {room}; start "
            "more nodes, or take fewer workers or threads_per_worker"
        )


def _explained(error: BaseException) -> AstroError:
    causes = getattr(error, "worker_failures", {})
    for cause in causes.values():
        original = getattr(cause, "cause", cause)
        if isinstance(original, AstroError):
            return original
    text = str(next(iter(causes.values()), error)).strip()
    last = text.splitlines()[-1] if text else type(error).__name__
    return RunError(f"training stopped: {last}; the same command goes on from the last checkpoint")


def _train_on_worker(content: Mapping[str, Any]) -> None:
    """Train on one worker; Ray Train calls it on each."""
    config, tokens, run = content["config"], content["tokens"], content["run"]
    context = ray.train.get_context()
    set_allocator()
    configure_process(config.execution.threads_per_worker)
    device = ray.train.torch.get_device()
    place = Place(context.get_world_rank(), context.get_world_size(), torch.device(device))
    if place.any_rank(run.stop.exists()):
        return

    def keep(step: int, write: Callable[[Path], None]) -> None:
        with writing(run.checkpoints), tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            # What each worker wrote becomes one folder; it has been copied when this returns.
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))
        ray.train.get_all_reported_checkpoints()  # it waits until the checkpoint counts, whatever happens then

    try:
        trainer = Trainer(config, tokens, place)
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                trainer.load(Path(folder))
        trainer.run(Outlet(lambda kind, event: run.journal.note(kind, **event), keep, run.stop.exists))
        if trainer.is_done:
            trainer.write(run.model)
    except DivergedError as error:  # all workers come to it in the same step, so all end in order
        if place.rank == 0:
            _note_failure(run, error)
    except AstroError as error:  # maybe of this worker alone: others wait for it until Ray Train ends them all
        if not isinstance(error, StorageError) or lasts(error):
            _note_failure(run, error)
        raise


def _note_failure(run: TrainingDirectory, error: AstroError) -> None:
    """Tell the driver of an error that would come again, so that it does not let Ray Train try once more."""
    with contextlib.suppress(StorageError):
        kind = RunError if isinstance(error, DamagedError) else type(error)  # which is made of its message alone
        run.journal.note("failed", kind=kind.__name__, message=str(error))
