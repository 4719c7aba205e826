"""A whole training: check, make tokens, train on workers or here, write a checkpoint that transformers loads."""

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from astro import errors
from astro.errors import ConfigError, RunError
from astro.model.clips_file import CLIPS_FILE
from astro.process import configure_process
from astro_dist.config.cluster_paths import require_absolute
from astro_dist.config.training import TrainConfig
from astro_dist.console import in_words
from astro_dist.execution.termination import Terminated
from astro_dist.run_directory.lock import hold
from astro_dist.source.whole_text import require_place
from astro_dist.training.checkpoint import writing
from astro_dist.training.loop import Outlet, Trainer
from astro_dist.training.next_commands import next_commands
from astro_dist.training.parallel import Place
from astro_dist.training.progress import EventReader, in_line
from astro_dist.training.token_file import TokenFile, write_tokens
from astro_dist.training.trained_model import model_config, model_tokenizer, require_layers
from astro_dist.training.training_directory import TrainingDirectory
from astro_dist.training.watched import run_watched
from astro_dist.worker.device_check import takes_gpu

__all__ = ["TrainSummary", "train"]

_log = logging.getLogger("astro_dist")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """The figures of a finished training.

    Attributes:
        model: Folder of the trained model.
        clips: File of the learned clips; None where inputs were not rounded.
        steps: Number of steps.
        tokens: Number of tokens that were trained on, those of repeated passes too.
        loss: Mean cross-entropy of the last step's tokens, in nats.
        penalty: What kurtosis added to the loss in the last step.
        wall_s: Time of the last session, in seconds.
        input_bits: Width to which inputs were rounded; None where they were not.
        commands: Commands that go on with the model, quoted for a shell.
        notes: Sentences on what `quantize` refuses of the model.
    """

    model: str
    clips: str | None
    steps: int
    tokens: int
    loss: float
    penalty: float
    wall_s: float
    input_bits: int | None
    commands: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Say what came out, and how to go on."""
        extra = f" + {self.penalty:.4f} for kurtosis" if self.penalty else ""
        lines = [f"Loss {self.loss:.4f}{extra} after {self.steps:,} steps and {self.tokens:,} tokens; "
                 f"{in_words(self.wall_s)}", f"Model: {self.model}"]  # fmt: skip
        if self.clips:
            lines.append(f"Clips of inputs: {self.clips}")
        lines += [f"note: {note}" for note in self.notes]
        return [*lines, "Next:", *(f"  {command}" for command in self.commands)]


def train(config: TrainConfig) -> TrainSummary:
    """Do a training, or go on with it from its last checkpoint.

    Args:
        config: Configuration of the training.

    Raises:
        InputError: Something the user gave is wrong; nothing was started.
        AstroError: The training failed; its checkpoints are kept.
    """
    begin = time.perf_counter()
    _require_places(config)
    run = TrainingDirectory(config.output.dir.expanduser().absolute())
    tokenizer, settings = model_tokenizer(config.model), model_config(config.model)
    require_layers(config.model, settings, config.regularization.layers)
    _say_warmup(config)
    with hold(run.root):
        run.begin(config)
        figures = run.finished()
        if figures is not None:
            _log.info("%s: this training was finished already; nothing was done", run.root)
        else:
            vocabulary = settings.get_text_config().vocab_size
            tokens = write_tokens(config.text, tokenizer, vocabulary, run.tokens)
            _say_text(config, tokens)
            last = _train_and_listen(config, tokens, run)
            figures = _figures(config, tokens, run, last, time.perf_counter() - begin)
            run.finish(figures)
    input_bits = config.regularization.input_bits
    following = next_commands(run.model, input_bits, config.model.trust_remote_code)
    named = {field.name: figures[field.name] for field in dataclasses.fields(TrainSummary) if field.name in figures}
    return TrainSummary(**{**named, "input_bits": input_bits, "commands": following.commands, "notes": following.notes})


def _figures(
    config: TrainConfig, tokens: TokenFile, run: TrainingDirectory, last: dict[str, Any], wall_s: float
) -> dict[str, Any]:
    """Return what is recorded of a finished training, of which the event of the last step is given."""
    has_clips = config.regularization.input_bits is not None
    return {
        "model": str(run.model),
        "clips": str(run.model / CLIPS_FILE) if has_clips else None,
        "steps": config.optimization.steps,
        "tokens": config.optimization.steps * config.optimization.batch_sequences * tokens.length,
        "loss": last["loss"],
        "penalty": last["penalty"],
        "wall_s": round(wall_s, 2),
    }


def _train_and_listen(config: TrainConfig, tokens: TokenFile, run: TrainingDirectory) -> dict[str, Any]:
    """Train, say what happens, and return the event of the last step."""
    reader = EventReader(run.journal.path)
    last: dict[str, Any] = {}
    kept: int | None = None

    def look() -> None:
        nonlocal kept
        for event in reader.new_events():
            line = in_line(event)
            if line:
                _log.info(line)
            if event["event"] == "step":
                last.update(event)
            if event["event"] in ("begun", "checkpoint"):
                kept = event["step"]
            if event["event"] == "failed":
                raise getattr(errors, event["kind"], RunError)(event["message"])

    def is_done() -> bool:
        return last.get("step") == config.optimization.steps and (run.model / "config.json").is_file()

    try:
        _train_where_it_belongs(config, tokens, run, look)
    except (KeyboardInterrupt, Terminated):
        if not is_done():  # else it came in the last step
            _log.info("%s", "no step was done" if kept is None else _say_kept(kept))
            raise
    look()
    if not last:
        raise RunError(f"{run.journal.path}: tells of no step; run the same command to go on")
    if not is_done():
        raise RunError(
            f"training stopped at step {last['step']} of {config.optimization.steps}, or its model was not written to "
            f"{run.model}; run the same command to go on from the last checkpoint"
        )
    return last


def _say_kept(step: int) -> str:
    return f"the last checkpoint is behind step {step:,}" if step else "there is no checkpoint yet"


def _train_where_it_belongs(
    config: TrainConfig, tokens: TokenFile, run: TrainingDirectory, look: Callable[[], None]
) -> None:
    if config.execution.executor == "local":
        _train_here(config, tokens, run, look)
    else:
        try:
            from astro_dist.training.ray_training import train_with_ray  # slow to import, and wants pandas
        except ImportError as error:
            raise ConfigError(
                f"execution.executor: ray wants Ray Train: pip install 'astro-dist[train]' ({error})"
            ) from error
        train_with_ray(config, tokens, run, look)


def _train_here(config: TrainConfig, tokens: TokenFile, run: TrainingDirectory, look: Callable[[], None]) -> None:
    """Train in this process, from the last checkpoint if there is one."""
    execution = config.execution
    device = torch.device("cuda" if takes_gpu(execution.device) else "cpu")
    run.require_executor("local")
    place = Place(0, 1, device)

    def keep(step: int, write: Callable[[Path], None]) -> None:
        target = run.local_checkpoint(step)
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with writing(target):
            partial.mkdir(parents=True)
            write(partial)
            partial.rename(target)
        for old in run.local_checkpoints[: -config.output.keep_checkpoints]:
            shutil.rmtree(old)

    def work() -> None:
        configure_process(execution.threads_per_worker)
        trainer = Trainer(config, tokens, place)
        if folders := run.local_checkpoints:
            trainer.load(folders[-1])
        trainer.run(Outlet(lambda kind, event: run.journal.note(kind, **event), keep, run.stop.exists))
        if trainer.is_done:
            trainer.write(run.model)

    run_watched(work, look, run.stop, awaits_end=False)


def _require_places(config: TrainConfig) -> None:
    """Refuse a text that is not there, and paths that only mean the same on this machine."""
    require_place(config.text.text_source, "text.source")
    if config.execution.executor == "local" or config.execution.cluster_address is None:
        return
    paths = {"output.dir": config.output.dir}
    if Path(config.model.source).exists():
        paths["model.source"] = Path(config.model.source)
    require_absolute(paths)


def _say_warmup(config: TrainConfig) -> None:
    steps, warmup = config.optimization.steps, config.optimization.warmup_steps
    if warmup >= steps:
        _log.warning(
            "optimization.warmup_steps: %d is not below steps: %d, so the learning rate rises to the end", warmup, steps
        )


def _say_text(config: TrainConfig, tokens: TokenFile) -> None:
    needed = config.optimization.steps * config.optimization.batch_sequences
    _log.info(
        "%s: %s tokens, %s sequences of %d; the training takes %s, %.1f times the text", config.text.source,
        f"{tokens.num_tokens:,}", f"{tokens.num_sequences:,}", tokens.length, f"{needed:,}",
        needed / tokens.num_sequences,
    )  # fmt: skip
