"""What a worker is built from."""

import dataclasses
from pathlib import Path

import torch

from astro.config import Experts, Quantization, Regularizer
from astro.storage.checkpoint import Checkpoint
from astro_dist.planning.units import Plan
from astro_dist.run_directory.records import RunDirectory

__all__ = ["WorkerSpec"]


@dataclasses.dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker is built from, and rebuilt from after a failure.

    Attributes:
        checkpoint: the source, as the driver found it.
        folder: with config.json and code of the source, which every node sees.
        fingerprint: of the source.
        trust_remote_code: whether code of the checkpoint may run.
        run: the run directory.
        plan: every unit.
        chunks: chunk names in the order in which they travel.
        shares: of the calibration chunks, in mode `sequential`.
        quantization: grid and solver.
        regularization: what is done to the weights before.
        experts: what is done about experts that too few tokens reach.
        compute_dtype: of forwards and activations.
        device: "cpu" or "cuda".
        threads: CPU threads.
        compiles: whether the innermost loops are compiled.
        needed_bytes: memory that a worker is expected to need.
    """

    checkpoint: Checkpoint
    folder: Path
    fingerprint: str
    trust_remote_code: bool
    run: RunDirectory
    plan: Plan
    chunks: tuple[str, ...]
    shares: int
    quantization: Quantization
    regularization: Regularizer
    experts: Experts
    compute_dtype: torch.dtype
    device: str
    threads: int
    compiles: bool
    needed_bytes: int
