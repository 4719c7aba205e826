"""The loop of a training on one worker; it knows no Ray. A worker computes its share of the sequences of every step."""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from astro.activation_regularization import ActivationRegularizer, rehearse
from astro.errors import ConfigError, DivergedError, NumericalError, RunError
from astro.linalg import compiled
from astro_dist.config.training import OptimizationConfig, TrainConfig
from astro_dist.training.checkpoint import load_checkpoint, save_checkpoint
from astro_dist.training.parallel import ParallelModel, Place
from astro_dist.training.token_file import TokenFile
from astro_dist.training.trained_model import build_model, model_tokenizer, write_model
from astro_dist.worker.compile_check import require_compiled

__all__ = ["Outlet", "Trainer", "learning_rate"]

_ADVICE = "begin anew in another output.dir, with a lower optimization.learning_rate or more optimization.warmup_steps"


def learning_rate(optimization: OptimizationConfig, step: int) -> float:
    """Return the learning rate of a step: it rises in a line to its highest, and falls as a cosine.

    Args:
        optimization: Section of the configuration.
        step: Number of the step, from 0.
    """
    highest, warmup = optimization.learning_rate, optimization.warmup_steps
    if step < warmup:
        return highest * (step + 1) / warmup
    passed = (step - warmup) / max(optimization.steps - warmup, 1)
    share = optimization.final_share + (1 - optimization.final_share) * (1 + math.cos(math.pi * passed)) / 2
    return highest * share


@dataclasses.dataclass(frozen=True)
class Outlet:
    """Where the loop leaves what it makes.

    Attributes:
        say: Function that takes the kind of an event and what is known of it; called on worker 0 alone. The kinds are
            in `progress`.
        keep: Function that takes the number of the next step and a function that writes a checkpoint into a folder; it
            is called on all workers.
        is_stopped: Function that tells before every step whether the training shall end early. All workers end behind
            the same step, as soon as one of them is told.
    """

    say: Callable[[str, Mapping[str, Any]], None]
    keep: Callable[[int, Callable[[Path], None]], None]
    is_stopped: Callable[[], bool] = lambda: False


class Trainer:
    """Trains a model on one of several workers.

    Attributes:
        model: The model on all workers.
        regularizer: What is done to its layers.
        step: Number of steps that are done.
    """

    def __init__(self, config: TrainConfig, tokens: TokenFile, place: Place) -> None:
        """Make the model and the optimizers.

        Args:
            config: Configuration of the training.
            tokens: Tokens of the text.
            place: Where this worker is among all.

        Raises:
            InputError: The model cannot be made, or a pattern matches no layer.
        """
        self._config, self._tokens, self._place = config, tokens, place
        optimization = config.optimization
        self._precision = optimization.precision
        if self._precision == "auto":
            self._precision = "bfloat16" if place.device.type == "cuda" else "float32"
        model = build_model(config.model, optimization.seed)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.regularizer = ActivationRegularizer(model, config.regularization, place.device)
        self.model = ParallelModel(model, place, config.execution.strategy, self._precision)
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        decay = optimization.weight_decay
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=optimization.learning_rate,
            betas=optimization.betas,
        )
        # An optimizer of its own: the state of the first belongs to the model's parameters, which checkpoints name.
        self._clip_optimizer = torch.optim.AdamW([self.regularizer.parameter_group()], lr=optimization.learning_rate)
        self.step = 0

    @property
    def is_done(self) -> bool:
        """Whether all steps are done."""
        return self.step == self._config.optimization.steps

    def load(self, folder: Path) -> None:
        """Take the state of a checkpoint, which may be of another number of workers.

        Args:
            folder: Folder of the checkpoint.

        Raises:
            ConfigError: It was trained in another precision.
            DamagedError: It cannot be read.
        """
        common = load_checkpoint(folder, self.model.model, self._optimizer)
        if common.get("precision", self._precision) != self._precision:
            raise ConfigError(
                f"{folder}: was trained in {common['precision']}, and optimization.precision: "
                f"{self._config.optimization.precision} is {self._precision} on {self._place.device.type}; go on "
                "with such devices as it was begun on, or begin anew in another output.dir"
            )
        with torch.no_grad():
            self.regularizer.clips.copy_(common["clips"])
        self._clip_optimizer.load_state_dict(common["optimizer"])
        self.step = int(common["step"])

    def run(self, outlet: Outlet) -> None:
        """Do the steps that are left, and write a checkpoint where the training is stopped before its end.

        Args:
            outlet: Where figures and checkpoints go.

        Raises:
            DivergedError: The loss is not finite, or clips have met; it is the same on all workers.
            RunError: The regularization is to be compiled, which some worker cannot.
            NumericalError: Something was compiled at first, and cannot be for other sizes.
            StorageError: The journal or a checkpoint cannot be written.
        """
        loops = self._choose_loops(outlet)
        with compiled.using(loops):
            self._run(outlet, loops)

    def _run(self, outlet: Outlet, loops: compiled.ColumnLoops) -> None:
        output = self._config.output
        regularizer = self.regularizer
        is_plain = self._config.regularization.is_off
        self._say(outlet, "begun", {
            "layers": 0 if is_plain else len(regularizer.names), "left_out": [] if is_plain else regularizer.left_out,
            "step": self.step, "parameters": self.num_parameters, "workers": self._place.world_size,
            "precision": self._precision, "device": self._place.device.type, "pid": os.getpid(),
            "is_compiled": loops == "compiled",
        })  # fmt: skip
        since, first = time.monotonic(), self.step
        begin = kept = self.step
        while not self.is_done and not self._place.any_rank(outlet.is_stopped()):
            losses = self._do_step()
            reports = self.step % output.report_every == 0 or self.is_done or self.step == begin + 1
            keeps = self.step % output.checkpoint_every == 0 and not self.is_done
            if reports or keeps:
                figures = self.model.mean(losses).tolist()
                self._require_finite(figures)
                if reports:
                    self._report(outlet, figures, (time.monotonic() - since) / (self.step - first))
                    since, first = time.monotonic(), self.step
            if keeps:
                kept = self._keep(outlet)
                since, first = time.monotonic(), self.step
        if not self.is_done and self.step > kept:
            self._require_finite(self.model.mean(losses).tolist())
            self._keep(outlet)

    def write(self, folder: Path) -> None:
        """Write the trained model; all workers must call it.

        Args:
            folder: Where the checkpoint belongs.

        Raises:
            StorageError: The folder cannot be written.
        """
        state = self.model.full_state()
        if self._place.rank == 0:
            dtype = torch.bfloat16 if self._precision == "bfloat16" else torch.float32
            tokenizer = model_tokenizer(self._config.model)
            write_model(self.model.model, state, tokenizer, self.regularizer, folder, dtype)

    def _do_step(self) -> torch.Tensor:
        """Do one step, and return the mean loss and penalty of this worker's sequences, and the gradient's norm [3]."""
        optimization, place = self._config.optimization, self._place
        share = optimization.batch_sequences // place.world_size
        first = self.step * optimization.batch_sequences + place.rank * share
        batch = self._tokens.sequences(first, share, optimization.seed).to(place.device)
        torch.manual_seed(hash((optimization.seed, self.step, place.rank)) % (1 << 31))  # of dropout
        micro_batches = batch.split(optimization.micro_batch_sequences)
        total = torch.zeros(2, device=place.device)
        for number, sequences in enumerate(micro_batches, 1):
            with self.model.accumulating(is_last=number == len(micro_batches)):
                loss = self.model.loss(sequences)
                penalty = self.regularizer.penalty(sequences.numel())
                ((loss + penalty) / len(micro_batches)).backward()
            total += torch.stack((loss.detach(), penalty.detach())) / len(micro_batches)
        if self.regularizer.clips.grad is not None:
            self.regularizer.clips.grad = self.model.mean(self.regularizer.clips.grad)
        gradient = self.model.clip_gradient(optimization.gradient_clip)
        for optimizer in (self._optimizer, self._clip_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(optimization, self.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return torch.cat((total, gradient.to(total)[None]))

    def _choose_loops(self, outlet: Outlet) -> compiled.ColumnLoops:
        """Return how the regularization runs, which is the same on all workers."""
        wish = self._config.execution.compile
        if self._config.regularization.is_off or wish is False:
            return "plain"
        self._say(outlet, "compiling", {})
        advice = "Mend that on every node" + (", or set execution.compile: auto" if wish is True else "")
        reasons = [reason for reason in self._place.all_gather(self._why_not_compiled(advice)) if reason]
        if not reasons:
            return "compiled"
        if wish is True:
            raise RunError(reasons[0])
        self._say(outlet, "not_compiled", {"reason": reasons[0]})
        return "plain"

    def _why_not_compiled(self, advice: str) -> str:
        """Compile the regularization, and return why this worker cannot; nothing where it can."""
        settings, device = self._config.regularization, self._place.device
        dtypes = {torch.float32, torch.bfloat16 if self._precision == "bfloat16" else torch.float32}
        try:
            with compiled.using("compiled"):
                for dtype in dtypes:
                    action = functools.partial(rehearse, settings, dtype, device)
                    require_compiled(action, "the regularization", device, advice)
        except RunError as error:
            return str(error)
        return ""

    def _keep(self, outlet: Outlet) -> int:
        """Leave a checkpoint, say so, and return the step behind which it is."""
        outlet.keep(self.step, self._write_checkpoint)
        self._say(outlet, "checkpoint", {"step": self.step})
        return self.step

    def _write_checkpoint(self, folder: Path) -> None:
        clips = {"clips": self.regularizer.clips.detach(), "optimizer": self._clip_optimizer.state_dict()}
        common = {**clips, "step": self.step, "precision": self._precision} if self._place.rank == 0 else None
        save_checkpoint(folder, self.model.model, self._optimizer, common)

    def _require_finite(self, figures: list[float]) -> None:
        """Refuse what no step can mend: with such a gradient, the weights are not finite either."""
        loss, penalty, gradient = figures
        if not math.isfinite(sum(figures)):
            raise DivergedError(
                f"step {self.step}: the loss is {loss:g}, kurtosis adds {penalty:g}, and the gradient's norm is "
                f"{gradient:g}; {_ADVICE}"
            )
        if self._config.regularization.input_bits is None:
            return
        try:
            self.regularizer.require_open()
        except NumericalError as error:
            raise DivergedError(f"step {self.step}: {error}; {_ADVICE}") from error

    def _report(self, outlet: Outlet, figures: list[float], step_s: float) -> None:
        optimization = self._config.optimization
        self._say(outlet, "step", {
            "step": self.step, "steps": optimization.steps, "loss": figures[0], "penalty": figures[1],
            "rate": learning_rate(optimization, self.step - 1),
            "tokens_per_s": optimization.batch_sequences * self._tokens.length / step_s,
            "left_s": (optimization.steps - self.step) * step_s,
        })  # fmt: skip

    def _say(self, outlet: Outlet, kind: str, content: Mapping[str, Any]) -> None:
        if self._place.rank == 0:
            outlet.say(kind, content)
