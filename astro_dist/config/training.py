"""The configuration of one training, by sections. The docstring of each key is its reference."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from astro.training_config import ActivationRegularization
from astro_dist.config.calibration import TextSource
from astro_dist.config.section import Configuration, Section, cluster_address
from astro_dist.config.text_place import PYTHON_DOCS

__all__ = [
    "OptimizationConfig",
    "TrainConfig",
    "TrainExecutionConfig",
    "TrainModelConfig",
    "TrainOutputConfig",
    "TrainTextConfig",
]


class TrainModelConfig(Section):
    """The section `model` says which model is trained, and from which weights."""

    source: str
    """The folder, or the repository on the Hub (ORG/NAME), with config.json, the tokenizer, and weights if they are
    wanted; or `demo:smollm2-135m`, the model of the quickstart."""
    revision: str | None = None
    """The branch, tag or commit of a Hub repository; where it is not given, `main` is read."""
    start: Literal["scratch", "weights"] = "scratch"
    """Where the training begins: at random weights (`scratch`), or at those of the source."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of config.json that shall have other values, such as `num_hidden_layers: 4`; only from scratch."""
    trust_remote_code: bool = False
    """Whether to run the Python code that a checkpoint ships. Set it only for sources that you trust like your own
    code."""

    @model_validator(mode="after")
    def _check(self) -> "TrainModelConfig":
        if self.overrides and self.start == "weights":
            raise ValueError("overrides: only with start: scratch, because the weights of the source would not fit")
        if "://" in self.source:
            raise ValueError(
                f"source: expected a folder or ORG/NAME on the Hub, got {self.source}; copy it to a folder"
            )
        return self


class TrainTextConfig(Section):
    """The section `text` says what the model is trained on."""

    source: str = PYTHON_DOCS
    """The text: `python-docs` (the Python language reference that every CPython ships), the path of a .txt, .parquet,
    .jsonl or .jsonl.gz file, or a dataset of the Hub (ORG/NAME), which needs the package `datasets`. All of it is made
    tokens before training begins."""
    subset: str | None = None
    """The subset (configuration) of a dataset on the Hub; where it is not given, the only one or the default one."""
    split: str = "train"
    """The split of a dataset on the Hub."""
    revision: str | None = None
    """The branch, tag or commit of a dataset on the Hub; where it is not given, `main`."""
    column: str = "text"
    """The column whose rows are documents."""
    sequence_length: int = Field(1024, ge=8)
    """The length of each sequence in tokens. Documents follow each other with the tokenizer's end-of-text token between
    them, and are cut where a sequence is full."""

    @property
    def text_source(self) -> TextSource:
        """Where the text is."""
        return TextSource(
            source=self.source, subset=self.subset, split=self.split, revision=self.revision,
            column=self.column, share=1.0,
        )  # fmt: skip


class OptimizationConfig(Section):
    """The section `optimization` says how the weights are trained; the optimizer is AdamW."""

    steps: int = Field(ge=1)
    """The number of steps of the optimizer."""
    batch_sequences: int = Field(64, ge=1)
    """The number of sequences of a step, over all workers: a multiple of the number of workers times
    `micro_batch_sequences`."""
    micro_batch_sequences: int = Field(8, ge=1)
    """The number of sequences that a worker computes at once. Gradients are added up until a step has all of its
    sequences, so this changes memory and speed, and the result only in its last bits."""
    learning_rate: float = Field(3e-4, gt=0)
    """The highest learning rate, which holds for weights and clips."""
    warmup_steps: int = Field(100, ge=0)
    """The number of steps in which the learning rate rises to its highest."""
    final_share: float = Field(0.1, ge=0, le=1)
    """What is left of the learning rate at the end, as a share of the highest. It falls as a cosine."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's β₁ and β₂ of the weights."""
    weight_decay: float = Field(0.1, ge=0)
    """The decay of matrices; vectors, such as norms and biases, have none."""
    gradient_clip: float = Field(1.0, ge=0)
    """The norm to which the gradient of the weights is cut; 0 leaves it as it is."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """The dtype of the forward and backward passes. Weights, sums and the optimizer's state stay in float32. `auto` is
    bfloat16 on GPUs and float32 on CPUs; a training goes on in the precision in which it began."""
    seed: int = Field(0, ge=0)
    """The seed of random weights, and of the order of the sequences."""

    @model_validator(mode="after")
    def _check(self) -> "OptimizationConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers from 0 to below 1, got {list(self.betas)}")
        return self


class TrainExecutionConfig(Section):
    """The section `execution` says who trains.

    None of its keys changes the result but in its last bits, with two exceptions: dropout leaves out other inputs with
    another number of workers, and in bfloat16 `fsdp` has norms and the residual stream in bfloat16 too.
    """

    executor: Literal["ray", "local"] = "ray"
    """Where the workers live: `ray` trains with Ray Train on a cluster, `local` with one worker in this process. A
    training goes on with the executor that began it."""
    workers: int = Field(1, ge=1)
    """The number of workers, each with one GPU, or with `threads_per_worker` CPUs. Each computes its share of every
    step. The cluster must have room for all of them when a training begins."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """What each worker holds: with `ddp` all parameters, with `fsdp` (FSDP2) its share of them, and of the optimizer's
    state, for models that do not fit on one GPU. When it starts, a worker has all of the model in the memory of its
    host either way."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The kind of device; `auto` is `cuda` where the cluster, or with the local executor this machine, has GPUs."""
    threads_per_worker: int = Field(1, ge=1)
    """The number of CPU threads of each worker."""
    compile: bool | Literal["auto"] = "auto"
    """Whether the rounding of inputs and the kurtosis of outputs are compiled by torch.compile, which wants a C
    compiler for GPUs and one for C++ for CPUs. Without it they take longer. `auto` compiles where all workers can, and
    says so where one cannot."""
    ray_address: str = "auto"
    """The address of the Ray cluster. `auto` is the cluster in the variable RAY_ADDRESS, or a private one on this
    machine where it is not set."""
    max_retries: int = Field(3, ge=0)
    """How often training goes on from the last checkpoint after a worker died."""

    @model_validator(mode="after")
    def _check(self) -> "TrainExecutionConfig":
        if self.executor == "local" and (self.workers > 1 or self.strategy == "fsdp"):
            raise ValueError("executor: local is one worker with strategy: ddp; take ray for more")
        return self

    @property
    def cluster_address(self) -> str | None:
        """The address of the cluster to connect to; None stands for a private one on this machine."""
        return cluster_address(self.ray_address)


class TrainOutputConfig(Section):
    """The section `output` says where the training lives."""

    dir: Path
    """The run directory: the trained model will be in its folder `model`, checkpoints are in `checkpoints`. On a
    cluster every node must see it under this absolute path."""
    checkpoint_every: int = Field(500, ge=1)
    """The number of steps between two checkpoints. Training goes on from the last one. Ctrl-C and SIGTERM make one,
    too, where the workers have the time: two minutes, or eight seconds."""
    keep_checkpoints: int = Field(2, ge=1)
    """The number of checkpoints that are kept."""
    report_every: int = Field(10, ge=1)
    """The number of steps between two lines on the terminal. There is one for the first step besides."""


class TrainConfig(Configuration):
    """Everything that one training is asked to do; a YAML file of these sections is one training."""

    model: TrainModelConfig
    """Which model is trained, and from which weights."""
    text: TrainTextConfig = TrainTextConfig()
    """What the model is trained on."""
    regularization: ActivationRegularization = ActivationRegularization()
    """What keeps outlier channels out of activations."""
    optimization: OptimizationConfig
    """How the weights are trained."""
    execution: TrainExecutionConfig = TrainExecutionConfig()
    """Who trains."""
    output: TrainOutputConfig
    """Where the training lives."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        optimization, workers = self.optimization, self.execution.workers
        at_once = workers * optimization.micro_batch_sequences
        if optimization.batch_sequences % at_once:
            raise ValueError(
                f"optimization.batch_sequences: {optimization.batch_sequences} is no multiple of {at_once}, which is "
                f"{workers} workers times micro_batch_sequences: {optimization.micro_batch_sequences}"
            )
        return self

    def arithmetic(self) -> dict[str, Any]:
        """Return the keys that decide what is trained: all but those that say where and how fast."""
        content = self.plain()
        del content["execution"], content["output"], content["optimization"]["micro_batch_sequences"]
        return content
