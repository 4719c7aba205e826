"""The section of the configuration on workers and their order. The docstring of each key is its reference."""

from typing import Literal

from pydantic import Field, model_validator

from astro.linalg.tiling import TILE_ELEMENTS
from astro_dist.config.section import Section, cluster_address

__all__ = ["MOST_TILE_WEIGHTS", "ExecutionConfig", "Mode"]

Mode = Literal["blocks", "stages", "sequential"]
"""The order in which blocks and their layers are solved, see `ExecutionConfig.mode`."""

MOST_TILE_WEIGHTS = 1 << 30
"""The largest tile. Libraries count the elements of an array in 31 bits, and a solve holds nine such arrays."""


class ExecutionConfig(Section):
    """The section `execution` says who does the work, and in which order.

    The keys up to `tile_weights` can change the bytes of the result; those after it cannot.
    """

    mode: Mode = "blocks"
    """The order of blocks and layers. With `blocks` all blocks are quantized in parallel, each calibrated on the source
    model or on the result of the round before. `stages` does so too, but within each block the layers are quantized in
    the order of its forward: later ones are calibrated behind the quantized ones before them, and make up for their
    errors. With `sequential` all workers are at one block, which is calibrated on what the quantized blocks before it
    give."""
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
        if self.mode != "blocks" and self.rounds > 1:
            raise ValueError(f"rounds: only in mode blocks, got {self.rounds} in mode {self.mode}")
        return self

    @property
    def cluster_address(self) -> str | None:
        """The address of the cluster to connect to; None stands for a private one on this machine."""
        return cluster_address(self.ray_address)
