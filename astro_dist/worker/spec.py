"""What a worker is built from."""

import dataclasses
from pathlib import Path

import torch

from astro.activation_config import Activations, Reconstruction
from astro.calibration.token_weights import Kind
from astro.config import Experts, Quantization, Regularizer
from astro.linalg.compiled import ColumnLoops
from astro.storage.checkpoint import Checkpoint
from astro_dist.config.execution import Mode
from astro_dist.planning.units import Plan
from astro_dist.run_directory.records import RunDirectory
from astro_dist.schedule.names import is_held_out

__all__ = ["WorkerSpec"]


@dataclasses.dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker is built from, and rebuilt from after a failure.

    Attributes:
        checkpoint: Checkpoint of the source, as the driver opened it.
        folder: Folder with config.json and code of the source, which every node sees.
        fingerprint: Fingerprint of the source.
        trust_remote_code: Whether code of the checkpoint may run.
        run: Run directory.
        activations_stamp: Stamp of the folder of local activations; empty where the run has none.
        plan: Units of the run.
        chunks: Names of the chunks in the order in which they travel.
        num_leading: Number of tokens that the tokenizer puts in front of every sequence, and that are no text.
        mode: Order in which blocks and their layers are solved, see `ExecutionConfig.mode`.
        shares: Number of shares of the calibration chunks in mode `sequential`.
        quantization: Grids and solver.
        activations: Settings of what servers do with the inputs of layers.
        regularization: Settings of what is done to the weights before they are rounded.
        reconstruction: Settings of what is done about the errors that are left.
        experts: Policy about experts that too few tokens reach.
        token_weights: What the calibration tokens are weighted by.
        compute_dtype: Dtype of forward passes and activations.
        device: Type of the device, "cpu" or "cuda".
        threads: Number of CPU threads.
        column_loops: How the innermost loops run.
        tile_elements: Weights that are solved at once.
        needed_bytes: Memory that a worker is expected to need, in bytes.
    """

    checkpoint: Checkpoint
    folder: Path
    fingerprint: str
    trust_remote_code: bool
    run: RunDirectory
    activations_stamp: str
    plan: Plan
    chunks: tuple[str, ...]
    num_leading: int
    mode: Mode
    shares: int
    quantization: Quantization
    activations: Activations
    regularization: Regularizer
    reconstruction: Reconstruction
    experts: Experts
    token_weights: Kind
    compute_dtype: torch.dtype
    device: str
    threads: int
    column_loops: ColumnLoops
    tile_elements: int
    needed_bytes: int

    @property
    def is_sequential(self) -> bool:
        """Whether blocks are calibrated on what the quantized blocks before them give."""
        return self.mode == "sequential"

    @property
    def calibration_chunks(self) -> list[str]:
        """The names of the chunks that are calibrated on."""
        return [chunk for chunk in self.chunks if not is_held_out(chunk)]

    @property
    def held_out_chunks(self) -> list[str]:
        """The names of the chunks that are only measured on."""
        return [chunk for chunk in self.chunks if is_held_out(chunk)]
