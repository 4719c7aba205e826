"""The executor that has all its workers in this process."""

import pytest
import torch

from astro.errors import ConfigError, RunError
from astro_dist import pipeline
from astro_dist.execution import local_executor
from astro_dist.worker import block_files, device_check

TOO_OLD = "torch 3.0 is built for CUDA 13.0 and can use no GPU"


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_gpu_that_torch_cannot_use_is_refused_before_anything_starts(run_config, tmp_path, monkeypatch, device):
    monkeypatch.setattr(device_check, "has_gpu", lambda: True)
    monkeypatch.setattr(device_check, "gpu_trouble", lambda key: TOO_OLD)
    with pytest.raises(ConfigError, match=f"execution.device: {device}: .*, but {TOO_OLD}"):
        pipeline.quantize(run_config(execution__executor="local", execution__device=device))
    assert not (tmp_path / "run" / "records").exists()


def test_auto_takes_the_gpu_that_is_there_and_none_that_is_not(monkeypatch):
    monkeypatch.setattr(device_check, "gpu_trouble", lambda key: None)
    for there in (True, False):
        monkeypatch.setattr(device_check, "has_gpu", lambda there=there: there)
        assert local_executor.LocalExecutor(1, device="auto").has_gpus == there
        assert not local_executor.LocalExecutor(1, device="cpu").has_gpus


@pytest.mark.parametrize("retries", [0, 3])
def test_too_little_memory_is_tried_once_more_and_says_how_much_was_wanted(run_config, monkeypatch, retries):
    asked = []

    def short(runner, *_):
        asked.append(runner)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 13.50 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(block_files, "write_block", short)
    attempts = min(retries, 1) + 1
    match = (
        rf"block 1 of 3, solve block on .*: out of memory: 13.50 GiB more were wanted. Attempt {attempts} of {attempts}"
    )
    with pytest.raises(RunError, match=match):
        pipeline.quantize(run_config(execution__max_retries=retries))
    assert len(asked) == attempts
