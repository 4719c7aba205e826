"""A cluster whose GPUs torch cannot use."""

import platform

import pytest
import ray
import torch

from astro.errors import RunError
from astro_dist import pipeline

pytestmark = pytest.mark.ray


def test_gpu_that_torch_cannot_use_ends_the_run_at_once(run_config):
    """Ray sees a GPU where it is told so; torch here has no CUDA, as where a driver is too old."""
    if torch.cuda.is_available():
        pytest.skip("torch can use the GPU of this machine")
    ray.init(
        address="local", num_cpus=1, num_gpus=1, include_dashboard=False, object_store_memory=80_000_000,
        log_to_driver=False,
    )  # fmt: skip
    try:
        with pytest.raises(RunError, match=rf"{platform.node()}: torch .* set execution.device: cpu"):
            pipeline.quantize(run_config(execution__executor="ray", execution__device="auto"))
    finally:
        ray.shutdown()
