"""The configuration of one whole run, by sections. The docstring of each key is its reference."""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from astro.config import Experts, Quantization, Regularizer, SolverSettings
from astro.linalg.tiling import TILE_ELEMENTS

__all__ = [
    "MOST_TILE_WEIGHTS",
    "CalibrationConfig",
    "ExecutionConfig",
    "ModelConfig",
    "OutputConfig",
    "PublishConfig",
    "RunConfig",
    "TextSource",
    "run_key",
]

_NO_ARITHMETIC: dict[str, frozenset[str] | None] = {
    "model": None,
    "calibration": frozenset({"source", "subset", "split", "revision", "column", "sources"}),
    "execution": frozenset(
        {
            "executor",
            "workers",
            "device",
            "device_memory_gb",
            "ray_address",
            "max_retries",
            "call_timeout_s",
            "worker_timeout_s",
        }
    ),
    "output": None,
    "publish": None,
}
"""The keys of each section that cannot change a byte of the result; None stands for the whole section.

Every key that is not listed here is part of a run's identity, so that a new key can never make two different runs
share one. The source model and the text of calibration count by their content, not by the path to it: `run_key` takes
the fingerprint of the one, and the run directory holds the hash of the tokens of the other.
"""
_TEXT_KEYS = ("source", "subset", "split", "revision", "column")
"""The keys that say where one text of calibration is."""
_SAMPLES, _HOLDOUT_SAMPLES, _SEQUENCE_LENGTH = 128, 16, 2048
"""What `samples` and `holdout_samples` are where they are left to the text and it has enough."""
_SHARE_TOLERANCE = 0.011
"""How far the sum of shares may be from 1, so that three times 0.33 is right."""
MOST_TILE_WEIGHTS = 1 << 30
"""The largest tile. Libraries count the elements of an array in 31 bits, and a solve holds nine such arrays."""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """The section `model` says where the source model comes from."""

    source: str
    """The source model: a folder that holds config.json and *.safetensors, a repository of the Hub (ORG/NAME; a folder
    of that name comes first), the URL of an object store (s3://, gs://, ...), or `demo:smollm2-135m`, the model of the
    quickstart."""
    revision: str | None = None
    """The branch, tag or commit of a Hub repository; where it is not given, `main` is read. A run keeps the commit that
    it began with, even if the branch moves on."""
    name: str | None = None
    """The name on the Hub (ORG/NAME) of a model that lies in a folder or behind a URL. The card of the result names it
    as the base model."""
    cache_dir: Path | None = None
    """The folder in which each machine keeps pieces of remote files; where it is not given, `~/.cache/astro-dist`. The
    path must be absolute."""
    cache_gb: float = Field(20.0, ge=0)
    """The gigabytes (1e9 bytes) that these pieces may take on each machine; 0 keeps none. The few files of config
    and tokenizer come on top."""
    trust_remote_code: bool = False
    """Whether to run the Python code that a checkpoint ships. Set it only for sources that you trust like your own
    code."""
    check_weights: bool = True
    """Whether to read every weight of a folder once before anything starts, and to refuse NaN and Inf. The weights of a
    remote source are checked by the workers as they are read."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.name is not None and not _REPOSITORY.fullmatch(self.name):
            raise ValueError(f"name: expected ORG/NAME of a model on the Hub, got {self.name!r}")
        return self


class TextSource(_Section):
    """One of the texts that `calibration.sources` mixes."""

    source: str
    """The text: anything that `calibration.source` may name."""
    subset: str | None = None
    """The subset of a dataset on the Hub, as for a single text."""
    split: str = "train"
    """The split of a dataset on the Hub, as for a single text."""
    revision: str | None = None
    """The branch, tag or commit of a dataset on the Hub, as for a single text."""
    column: str = "auto"
    """The column with the text or the chats, as for a single text."""
    share: float = Field(gt=0, le=1)
    """The share of all sequences that comes from this text. The shares of all texts add up to 1."""


class CalibrationConfig(_Section):
    """The section `calibration` says on which text the statistics are collected, and perplexity is measured."""

    source: str = "python-docs"
    """The text: `python-docs` (the Python language reference that every CPython ships), the path of a .txt, .parquet,
    .jsonl or .jsonl.gz file, or a dataset of the Hub (ORG/NAME), which needs the package `datasets`."""
    subset: str | None = None
    """The subset (configuration) of a dataset on the Hub; where it is not given, the only one or the default one."""
    split: str = "train"
    """The split of a dataset on the Hub."""
    revision: str | None = None
    """The branch, tag or commit of a dataset on the Hub; where it is not given, `main`. A run keeps the commit that it
    began with, even if the branch moves on."""
    column: str = "auto"
    """The column whose rows are documents: texts, or chats, which the model's own chat template renders. `auto` takes
    the first that is there of `text`, `messages` and `conversations`."""
    sources: tuple[TextSource, ...] = ()
    """Several texts instead of one, each with its share of the sequences."""
    samples: int | Literal["auto"] = "auto"
    """The number of sequences that the statistics are collected on; `auto` is 128, or as many as the text has."""
    sequence_length: Annotated[int, Field(ge=8)] | Literal["auto"] = "auto"
    """The length of each sequence in tokens; `auto` is 2048, or as many as the model has positions."""
    chunk_samples: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    """The number of sequences that are computed and sent together. It changes the order of sums, and so the result in
    its last bits. `auto` is the largest of 8, 4, 2 and 1 with which a worker fits into `execution.device_memory_gb`."""
    holdout_samples: int | Literal["auto"] = "auto"
    """The number of held-out sequences on which the perplexity before and after is measured; 0 measures none, and
    `auto` is 16, or as many as the quarter of the text has that is held out."""
    seed: int = Field(0, ge=0)
    """The seed that chooses which sequences of the text are taken."""
    token_weights: Literal["loss", "norm", "none"] = "loss"
    """How much each token counts. `loss` measures it: the root of the energy that the loss's gradient has at a layer's
    outputs, which takes one backward pass of the source model. `norm` gives every token the same energy, for free.
    With `none` all tokens count alike, and the few with massive activations own the statistics."""

    @property
    def settled_chunk_samples(self) -> int:
        """The number of sequences that are computed together, once `auto` is settled by the plan."""
        assert self.chunk_samples != "auto", "the size of chunks is not settled yet"
        return self.chunk_samples

    @property
    def longest_sequence(self) -> int:
        """The length of each sequence in tokens, if the model has so many positions."""
        return _SEQUENCE_LENGTH if self.sequence_length == "auto" else self.sequence_length

    @property
    def texts(self) -> tuple[TextSource, ...]:
        """The texts: those of `sources`, or the only one with a share of 1."""
        if self.sources:
            return self.sources
        place = {key: getattr(self, key) for key in _TEXT_KEYS}
        return (TextSource(**place, share=1.0),)

    @property
    def most_samples(self) -> int:
        """The number of sequences to calibrate on, if the text has so many."""
        return _SAMPLES if self.samples == "auto" else self.samples

    @property
    def most_holdout_samples(self) -> int:
        """The number of held-out sequences, if the text has so many."""
        return _HOLDOUT_SAMPLES if self.holdout_samples == "auto" else self.holdout_samples

    @model_validator(mode="after")
    def _check(self) -> "CalibrationConfig":
        for key, least in (("samples", 1), ("holdout_samples", 0)):
            count = getattr(self, key)
            if count != "auto" and count < least:
                raise ValueError(f"{key}: expected auto or at least {least}, got {count}")
        if self.sources:
            fields = type(self).model_fields
            beside = [key for key in _TEXT_KEYS if getattr(self, key) != fields[key].default]
            if beside:
                raise ValueError(f"{beside[0]}: write it into each of calibration.sources, or leave out the latter")
            total = sum(text.share for text in self.sources)
            if abs(total - 1) > _SHARE_TOLERANCE:
                raise ValueError(f"sources: the shares add up to {total:g}, expected 1")
        return self


class ExecutionConfig(_Section):
    """The section `execution` says who does the work, and in which order.

    The keys up to `tile_weights` can change the bytes of the result; those after it cannot.
    """

    mode: Literal["blocks", "sequential"] = "blocks"
    """The order of the blocks. With `blocks` all blocks are quantized in parallel, each calibrated on the source model
    or on the result of the round before. With `sequential` all workers are at one block, which is calibrated on what
    the quantized blocks before it give."""
    rounds: int = Field(1, ge=1, le=16)
    """The number of passes over the model in mode `blocks`; each calibrates on the model that the last one made."""
    hessian_shares: int = Field(4, ge=1)
    """The number of parts into which mode `sequential` cuts the calibration chunks, so that several workers accumulate
    the Hessians of one block."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of forward passes and activations. `auto` is the checkpoint's dtype, but float32 for float16 on a
    CPU."""
    threads_per_worker: int | Literal["auto"] = "auto"
    """The number of CPU threads that each worker computes with. `auto` is 1 without GPUs, where the number can change
    the result in its last bits; with GPUs it is the CPUs that a node has for each of its GPUs, and changes nothing."""
    compile: bool | Literal["auto", "kernels"] = "auto"
    """How the innermost loops of the solver run: `false` as single operations, `true` compiled by torch.compile, and
    `kernels` as kernels that are written for them, on GPUs only. Both build code on every node, which needs a C++
    compiler there. `auto` is `kernels` on GPUs and `false` on CPUs."""
    tile_weights: int | Literal["auto"] = "auto"
    """The number of weights that a GPU solves at once; more take more memory and fewer steps, above all for experts.
    `auto` is the largest of 2³⁰, 2²⁹ and 2²⁸ with which a worker fits into `device_memory_gb`, and else 2²⁷. A CPU does
    not go by it."""

    executor: Literal["ray", "local"] = "ray"
    """Where the workers live: `ray` starts actors on a cluster, `local` computes in this process, for debugging."""
    workers: int | Literal["auto"] = "auto"
    """The number of workers. `auto` starts one for each GPU of the cluster, or one for each `threads_per_worker` CPUs
    where there is no GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The kind of device that workers compute on; `auto` is `cuda` where the cluster has GPUs, or, with the local
    executor, this machine."""
    device_memory_gb: float | None = Field(None, gt=0)
    """The memory of a worker's device in gigabytes (1e9 bytes), such as 80 for an H100. `chunk_samples: auto` and
    `tile_weights: auto` go by it. It is not read off the devices, so that the result does not depend on which are
    found."""
    ray_address: str = "auto"
    """The address of the Ray cluster. `auto` is the cluster in the variable RAY_ADDRESS, which `ray job submit` sets,
    or a private one on this machine where it is not set."""
    max_retries: int = Field(3, ge=0)
    """How often a unit of work is tried again after its worker died, hung or failed."""
    call_timeout_s: float | Literal["auto"] = "auto"
    """The seconds after which a worker's call is taken to hang and is given to another worker. `auto` derives them from
    what the call computes."""
    worker_timeout_s: float = Field(1800, gt=0)
    """The seconds that a run without any worker waits for one before it fails."""

    @property
    def cpu_threads(self) -> int:
        """The number of threads of a worker without a GPU."""
        return 1 if self.threads_per_worker == "auto" else self.threads_per_worker

    def column_loops(self, device_type: str) -> Literal["plain", "compiled", "kernels"]:
        """Say how the innermost loops of workers run.

        Args:
            device_type: The kind of device that they compute on, "cpu" or "cuda".
        """
        if self.compile == "kernels" or (self.compile == "auto" and device_type == "cuda"):
            return "kernels"
        return "compiled" if self.compile is True else "plain"

    def tile_elements(self, device_type: str) -> int:
        """Return the number of weights that workers solve at once, once `auto` is settled by the plan.

        Args:
            device_type: The kind of device that they compute on, "cpu" or "cuda".
        """
        if device_type == "cpu" or self.tile_weights == "auto":
            return TILE_ELEMENTS[device_type]
        return self.tile_weights

    @model_validator(mode="after")
    def _check(self) -> "ExecutionConfig":
        if isinstance(self.workers, int) and self.workers < 1:
            raise ValueError(f"workers: expected auto or at least 1, got {self.workers}")
        if isinstance(self.threads_per_worker, int) and self.threads_per_worker < 1:
            raise ValueError(f"threads_per_worker: expected auto or at least 1, got {self.threads_per_worker}")
        if self.tile_weights != "auto" and not TILE_ELEMENTS["cpu"] <= self.tile_weights <= MOST_TILE_WEIGHTS:
            raise ValueError(
                f"tile_weights: expected auto or {TILE_ELEMENTS['cpu']} to {MOST_TILE_WEIGHTS}, got {self.tile_weights}"
            )
        if self.call_timeout_s != "auto" and not self.call_timeout_s > 0:  # NaN is not
            raise ValueError(f"call_timeout_s: expected auto or more than 0, got {self.call_timeout_s}")
        if self.mode == "sequential" and self.rounds > 1:
            raise ValueError(f"rounds: only in mode blocks, got {self.rounds} in mode sequential")
        return self

    @property
    def cluster_address(self) -> str | None:
        """The address of the cluster to connect to; None stands for a private one on this machine."""
        return os.environ.get("RAY_ADDRESS") or None if self.ray_address == "auto" else self.ray_address


class OutputConfig(_Section):
    """The section `output` says where the run lives."""

    dir: Path
    """The run directory; the quantized model grows in its folder `model`. On a cluster every node must see it under
    this absolute path."""
    activations_dir: Path | None = None
    """A folder on a fast local disk for the activations of unfinished blocks, where all workers are on the node of the
    command; where it is not given, they are in the run directory. A run goes on without it, and computes again what was
    in it."""
    track: Literal["trackio", "wandb", "mlflow"] | None = None
    """The library that logs the run's figures when a block is done, and the summary at the end; where it is not given,
    none. It must be installed where the command runs. Its own settings, such as WANDB_PROJECT, say where it logs to."""


class PublishConfig(_Section):
    """The section `publish` says where on the Hugging Face Hub the result goes.

    It is no part of a run's identity: one result may go to many places.
    """

    repo: str | None = None
    """The repository on the Hub (ORG/NAME); where it is not given, nothing is published."""
    private: bool = True
    """Whether a repository that is made for the result can be seen by its owners only."""
    revision: str | None = None
    """The branch to commit to, which is made where it does not exist; where it is not given, `main`."""
    pull_request: bool = False
    """Whether to open a pull request against `main` instead of committing to it."""

    @model_validator(mode="after")
    def _check(self) -> "PublishConfig":
        if self.repo is not None and not _REPOSITORY.fullmatch(self.repo):
            raise ValueError(f"repo: expected ORG/NAME of a model repository, got {self.repo!r}")
        if self.revision is not None and self.pull_request:
            raise ValueError("revision: a pull request is made against main; give one of revision and pull_request")
        return self


class RunConfig(_Section):
    """Everything that one run is asked to do; a YAML file of these sections is one run."""

    model: ModelConfig
    """Where the source model comes from."""
    quantization: Quantization = Quantization()
    """The grid of the weights, and how they are rounded to it."""
    regularizer: Regularizer = Regularizer()
    """How weights are moved before they are rounded."""
    experts: Experts = Experts()
    """What to do with experts that calibration rarely reaches."""
    calibration: CalibrationConfig = CalibrationConfig()
    """On which text the statistics are collected."""
    execution: ExecutionConfig = ExecutionConfig()
    """Who does the work, and in which order."""
    output: OutputConfig
    """Where the run lives."""
    publish: PublishConfig = PublishConfig()
    """Where on the Hub the result goes."""

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.quantization.bits == "auto" and self.execution.rounds < 2:
            raise ValueError(
                "quantization.bits: auto wants execution.mode: blocks and execution.rounds of at least 2; the first "
                "round measures what each width costs"
            )
        return self

    def plain(self) -> dict[str, Any]:
        """Return the configuration as JSON types, with every default written out."""
        content = self.model_dump(mode="json")
        # What is asked for comes before how it is computed; a base class would have its fields first.
        solver = {field.name for field in dataclasses.fields(SolverSettings)}
        asked = {key: value for key, value in content["quantization"].items() if key not in solver}
        content["quantization"] = asked | content["quantization"]
        return content

    def arithmetic(self) -> dict[str, Any]:
        """Return the keys that decide the bytes of the result: all but those that say where a run happens."""
        deciding = {
            section: {key: value for key, value in keys.items() if key not in (_NO_ARITHMETIC.get(section) or ())}
            for section, keys in self.plain().items()
            if _NO_ARITHMETIC.get(section, ()) is not None
        }
        if deciding["execution"]["threads_per_worker"] == "auto":  # on GPUs the number of a node decides nothing
            deciding["execution"]["threads_per_worker"] = self.execution.cpu_threads
        if deciding["execution"]["tile_weights"] == "auto":  # no memory is named by which it could be settled
            deciding["execution"]["tile_weights"] = self.execution.tile_elements("cuda")
        return deciding

    def to_yaml(self) -> str:
        """Return the configuration as a YAML document that `load_config` reads back."""
        return yaml.safe_dump(self.plain(), sort_keys=False)


def run_key(config: RunConfig, source_fingerprint: str, version: str) -> str:
    """Return the identity of a run: two runs with one key write the same bytes.

    Args:
        config: The configuration of the run.
        source_fingerprint: The fingerprint of the source checkpoint.
        version: The version of this package.

    Returns:
        The SHA-256 of all three, as 64 hexadecimal digits.
    """
    content = {"arithmetic": config.arithmetic(), "source": source_fingerprint, "version": version}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
