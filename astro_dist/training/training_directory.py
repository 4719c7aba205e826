"""The run directory of a training: where its files are, and whether it is this very training that lies there."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal

from astro.errors import ConfigError, RunError
from astro.storage.atomic import read_json, write_json, write_text
from astro_dist.config.training import TrainConfig
from astro_dist.config.yaml_file import load_train_config
from astro_dist.run_directory.journal import Journal
from astro_dist.run_directory.layout import TRAINING_FILE, RunLayout

__all__ = ["CHECKPOINTS", "OBJECTIVE", "TrainingDirectory"]

_LOCAL, _OF_RAY = "step-", "checkpoint_"
"""How names of checkpoints begin: those of the local executor, and those of Ray Train."""
OBJECTIVE = 2
"""Number of what a training minimizes, which grows when the same settings come to mean something else. In 1, kurtosis
was added up over the tokens of a sequence; in 2 it is their mean. Versions before 0.12.0 recorded none, and the last of
them had 2."""

CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in the run directory."""


@dataclasses.dataclass(frozen=True)
class TrainingDirectory:
    """The run directory of a training.

    Attributes:
        root: Folder of the run directory.
    """

    root: Path

    @property
    def model(self) -> Path:
        """Folder of the trained model."""
        return self.root / "model"

    @property
    def tokens(self) -> Path:
        """File of the tokens of the text."""
        return self.root / "tokens.bin"

    @property
    def tokens_info(self) -> Path:
        """File of what is known of the tokens; without it they are made anew."""
        return self.tokens.with_suffix(".json")

    @property
    def journal(self) -> Journal:
        """Journal of the training, in which its events are lines."""
        return Journal(self.root / "progress.jsonl")

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.root / CHECKPOINTS

    @property
    def local_checkpoints(self) -> list[Path]:
        """Folders of the checkpoints that the local executor wrote, the newest last."""
        return sorted(self.checkpoints.glob(f"{_LOCAL}*"))

    @property
    def ray_checkpoints(self) -> list[Path]:
        """Folders of the checkpoints that Ray Train wrote, beside which it has files of its own."""
        return [path for path in self.checkpoints.glob(f"{_OF_RAY}*") if path.is_dir()]

    def local_checkpoint(self, step: int) -> Path:
        """Return the folder of a checkpoint of the local executor.

        Args:
            step: Number of the steps that are done.
        """
        return self.checkpoints / f"{_LOCAL}{step:09d}"

    @property
    def stop(self) -> Path:
        """File that tells workers to end; it is there only after an interruption."""
        return self.root / "stop"

    @property
    def summary(self) -> Path:
        """File of the figures of the finished training."""
        return self.root / "training.json"

    @property
    def objective(self) -> Path:
        """File of the number of what is minimized, see `OBJECTIVE`."""
        return self.root / "objective.json"

    def begin(self, config: TrainConfig) -> None:
        """Record the configuration, or refuse to go on with another one once there is a checkpoint.

        Args:
            config: Configuration of the training.

        Raises:
            ConfigError: A training with other settings lies in the folder, or one of an earlier version that minimized
                something else; the message names a key.
        """
        if RunLayout(self.root).identity.exists():
            raise ConfigError(f"output.dir {self.root}: holds a run of quantize; take another folder")
        path = self.root / TRAINING_FILE
        changed = _first_change(load_train_config(path), config) if path.is_file() else None
        if not self._has_begun():
            if changed:
                for file in (self.tokens_info, self.tokens):  # maybe of another text
                    file.unlink(missing_ok=True)
                shutil.rmtree(self.model, ignore_errors=True)
            write_json(self.objective, {"number": OBJECTIVE})
        elif changed:
            raise ConfigError(
                f"{self.root}: its training has {changed}; set it back to go on, or take another output.dir"
            )
        elif config.regularization.kurtosis and self.finished() is None:
            number = read_json(self.objective)["number"] if self.objective.is_file() else None
            if number != OBJECTIVE:
                raise ConfigError(
                    f"{self.root}: its training was begun by another version, in which the same "
                    "regularization.kurtosis may count otherwise; begin anew in another output.dir, or finish it with "
                    "that version"
                )
        write_text(path, config.to_yaml())

    def _has_begun(self) -> bool:
        """Return whether something lies here that would be lost: a checkpoint, or the trained model."""
        return self.summary.is_file() or bool(self.local_checkpoints or self.ray_checkpoints)

    def require_executor(self, executor: Literal["ray", "local"]) -> None:
        """Refuse a folder with checkpoints of the other executor, which keeps them in another way.

        Args:
            executor: The executor that is to go on.

        Raises:
            ConfigError: The other one began the training.
        """
        other, found = ("local", self.local_checkpoints) if executor == "ray" else ("ray", self.ray_checkpoints)
        if found:
            raise ConfigError(
                f"{self.checkpoints}: holds checkpoints of execution.executor: {other}; set it back to go on, or take "
                "another output.dir"
            )

    def finished(self) -> dict[str, Any] | None:
        """Return the figures of a finished training; None where it is not finished."""
        whole = self.summary.is_file() and (self.model / "config.json").is_file()
        return read_json(self.summary) if whole else None

    def finish(self, figures: dict[str, Any]) -> None:
        """Record that the training is finished.

        Args:
            figures: Its figures.

        Raises:
            RunError: The model was not written.
        """
        if not (self.model / "config.json").is_file():
            raise RunError(f"{self.model}: the trained model is not there; run the same command to go on")
        write_json(self.summary, figures)


def _first_change(before: TrainConfig, now: TrainConfig) -> str | None:
    """Return the first key that decides what is trained and has another value, with both values; None if none has."""
    earlier = before.arithmetic()
    for section, keys in now.arithmetic().items():
        for key, value in keys.items():
            if earlier[section][key] != value:
                return f"{section}.{key}: {earlier[section][key]}, got {value}"
    return None
