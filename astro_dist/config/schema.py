"""RunConfig: what one whole run is."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from astro.config import Experts, Quantization, Regularizer

__all__ = [
    "CalibrationConfig",
    "ExecutionConfig",
    "ModelConfig",
    "OutputConfig",
    "PublishConfig",
    "RunConfig",
    "run_key",
]

_ARITHMETIC = ("mode", "rounds", "hessian_shares", "compute_dtype", "threads_per_worker", "compile")
"""Keys of `execution` that decide the bytes of the result."""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """Where the model comes from."""

    source: str
    """Folder with config.json and *.safetensors, Hub repository (ORG/NAME; a folder of that name comes first), URL of
    an object store (s3://, gs://, ...), or `demo:smollm2-135m` (the quickstart's model)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository; `main` where not given. A run keeps the commit it began with."""
    name: str | None = None
    """ORG/NAME on the Hub of the model in a folder or behind a URL: what the result's card names as its base model."""
    cache_dir: Path | None = None
    """Where each machine keeps pieces of remote files; `~/.cache/astro-dist` where not given."""
    cache_gb: float = Field(20.0, ge=0)
    """Gigabytes that these pieces may take on each machine, beside the few of config and tokenizer."""
    trust_remote_code: bool = False
    """Run Python code that the checkpoint ships. Only for sources that you trust like your own code."""
    check_weights: bool = True
    """Read every weight of a folder once before anything starts and refuse NaN and Inf. What is remote is checked by
    the workers, as it is read."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.name is not None and not _REPOSITORY.fullmatch(self.name):
            raise ValueError(f"name: expected ORG/NAME of a model on the Hub, got {self.name!r}")
        return self


class CalibrationConfig(_Section):
    """Which text the statistics come from, and which text perplexity is measured on."""

    source: str = "python-docs"
    """`python-docs` (the Python language reference that every CPython ships), a .txt or a .parquet file."""
    text_column: str = "text"
    """Column of a parquet file that holds one document a row."""
    samples: int = Field(128, ge=1)
    """Calibration sequences."""
    sequence_length: int = Field(2048, ge=8)
    """Tokens a sequence."""
    chunk_samples: int = Field(8, ge=1)
    """Sequences that travel together. Part of the arithmetic."""
    holdout_samples: int = Field(16, ge=0)
    """Held-out sequences for both perplexities; 0 measures none."""
    seed: int = Field(0, ge=0)
    """Chooses which sequences of the text are taken."""


class ExecutionConfig(_Section):
    """Who does the work and in which order. The arithmetic depends on the first six alone."""

    mode: Literal["blocks", "sequential"] = "blocks"
    """`blocks`: all blocks in parallel, calibrated on the source model, or on the round before; `sequential`: each
    block calibrated on what the quantized blocks before it give, all workers at one block."""
    rounds: int = Field(1, ge=1, le=16)
    """In mode `blocks`: passes over the model; each calibrates on the quantized model of the one before."""
    hessian_shares: int = Field(4, ge=1)
    """In mode `sequential`: parts of the calibration chunks that workers share out among them."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of forward passes and activations. `auto` is the checkpoint's own dtype, but float32 for float16 on a CPU."""
    threads_per_worker: int = Field(1, ge=1)
    """CPU threads of a worker."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the innermost loops of the solve (torch.compile; wants a C++ compiler on every node). `auto`: on GPUs."""

    executor: Literal["ray", "local"] = "ray"
    """`ray`: actors on a cluster; `local`: in this process, for debugging."""
    workers: int | Literal["auto"] = "auto"
    """Workers; `auto` is one a GPU of the cluster, or one for each `threads_per_worker` CPUs where there is none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is cuda where the cluster has GPUs."""
    ray_address: str = "auto"
    """`auto`: the cluster in RAY_ADDRESS (set inside `ray job submit`), else a private one on this machine."""
    max_retries: int = Field(3, ge=0)
    """How often a unit is tried again after a worker died, hung or raised at it."""
    call_timeout_s: float | Literal["auto"] = "auto"
    """Seconds after which a worker's call is taken to hang and given to another; `auto` by what it computes."""
    worker_timeout_s: float = Field(1800, gt=0)
    """Seconds that the run waits without any worker before it fails."""

    def compiles(self, device_type: str) -> bool:
        """Whether workers on "cpu" or "cuda" compile."""
        return device_type == "cuda" if self.compile == "auto" else self.compile

    @model_validator(mode="after")
    def _check(self) -> "ExecutionConfig":
        if isinstance(self.workers, int) and self.workers < 1:
            raise ValueError(f"workers: expected auto or at least 1, got {self.workers}")
        if self.call_timeout_s != "auto" and not self.call_timeout_s > 0:  # NaN is not
            raise ValueError(f"call_timeout_s: expected auto or more than 0, got {self.call_timeout_s}")
        if self.mode == "sequential" and self.rounds > 1:
            raise ValueError(f"rounds: only in mode blocks, got {self.rounds} in mode sequential")
        return self

    @property
    def cluster_address(self) -> str | None:
        """Of the cluster to connect to; None for a private one on this machine."""
        return os.environ.get("RAY_ADDRESS") or None if self.ray_address == "auto" else self.ray_address


class OutputConfig(_Section):
    """Where the run lives."""

    dir: Path
    """Run directory; the model grows in its `model` folder. On a cluster: a folder that every node sees."""


class PublishConfig(_Section):
    """Where on the Hugging Face Hub the result goes. No part of a run's identity: one result may go to many places."""

    repo: str | None = None
    """ORG/NAME; nothing is published where not given."""
    private: bool = True
    """Whether a repository that is made for it can be seen by its owners alone."""
    revision: str | None = None
    """Branch, made where it is not there yet; `main` where not given."""
    pull_request: bool = False
    """Open a pull request instead of committing to `main`."""

    @model_validator(mode="after")
    def _check(self) -> "PublishConfig":
        if self.repo is not None and not _REPOSITORY.fullmatch(self.repo):
            raise ValueError(f"repo: expected ORG/NAME of a model repository, got {self.repo!r}")
        if self.revision is not None and self.pull_request:
            raise ValueError("revision: a pull request is made against main; give one of revision and pull_request")
        return self


class RunConfig(_Section):
    """A whole run."""

    model: ModelConfig
    quantization: Quantization = Quantization()
    regularizer: Regularizer = Regularizer()
    experts: Experts = Experts()
    calibration: CalibrationConfig = CalibrationConfig()
    execution: ExecutionConfig = ExecutionConfig()
    output: OutputConfig
    publish: PublishConfig = PublishConfig()

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.quantization.bits == "auto" and self.execution.rounds < 2:
            raise ValueError(
                "quantization.bits: auto wants execution.mode: blocks and execution.rounds of at least 2; the first "
                "round measures what each width costs"
            )
        return self

    def plain(self) -> dict[str, Any]:
        """The configuration as JSON types, every default written out."""
        return self.model_dump(mode="json")

    def arithmetic(self) -> dict[str, Any]:
        """The part that decides the bytes of the result: not where it runs, nor from which path.

        The text itself is told apart by the hash of its tokens.
        """
        plain = self.plain()
        for name in ("source", "text_column"):
            del plain["calibration"][name]
        execution = {name: plain["execution"][name] for name in _ARITHMETIC}
        kept = {name: plain[name] for name in ("quantization", "regularizer", "experts", "calibration")}
        return {**kept, "execution": execution}

    def to_yaml(self) -> str:
        """The configuration as a YAML document that `load_config` reads back."""
        return yaml.safe_dump(self.plain(), sort_keys=False)


def run_key(config: RunConfig, source_fingerprint: str, version: str) -> str:
    """Identity of a run: two runs with one key write the same bytes.

    Args:
        config: of the run.
        source_fingerprint: of the source checkpoint.
        version: of this package.
    """
    content = {"arithmetic": config.arithmetic(), "source": source_fingerprint, "version": version}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
