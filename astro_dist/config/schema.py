"""The configuration of one whole run, by sections. The docstring of each key is its reference."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from astro.activation_config import Activations, Reconstruction
from astro.config import Experts, Quantization, Regularizer, SolverSettings
from astro_dist.config.calibration import CalibrationConfig, TextSource
from astro_dist.config.execution import MOST_TILE_WEIGHTS, ExecutionConfig
from astro_dist.config.section import Configuration, Section

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
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class ModelConfig(Section):
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


class OutputConfig(Section):
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


class PublishConfig(Section):
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


class RunConfig(Configuration):
    """Everything that one run is asked to do; a YAML file of these sections is one run."""

    model: ModelConfig
    """Where the source model comes from."""
    quantization: Quantization = Quantization()
    """The grid of the weights, and how they are rounded to it."""
    activations: Activations = Activations()
    """What servers do with the inputs of quantized layers."""
    regularizer: Regularizer = Regularizer()
    """How weights are moved before they are rounded."""
    reconstruction: Reconstruction = Reconstruction()
    """What is done about the errors that are left."""
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
        if self.activations.scheme is not None and self.quantization.format == "gptq":
            raise ValueError(
                f"activations.bits: {self.activations.bits} wants quantization.format: compressed-tensors, because the "
                "GPTQ layout has no field for rounded inputs"
            )
        if self.activations.rounds_cache and self.quantization.format == "gptq":
            raise ValueError("activations.kv_cache: fp8 wants quantization.format: compressed-tensors")
        return self

    @property
    def makes_up_for_layers(self) -> bool:
        """Whether weights make up for errors of the layers before them."""
        return self.execution.mode != "blocks" and self.quantization.compensates

    def plain(self) -> dict[str, Any]:
        """Return the configuration as JSON types, with every default written out."""
        content = super().plain()
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
