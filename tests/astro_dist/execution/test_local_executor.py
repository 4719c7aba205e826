"""The executor that has all its workers in this process."""

import pytest
import torch

from astro.errors import ConfigError
from astro_dist import pipeline


def test_gpu_that_this_machine_has_not_is_refused(run_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = run_config(execution__executor="local", execution__device="cuda")
    with pytest.raises(ConfigError, match="this machine has no GPU that torch can use; set execution.device to auto"):
        pipeline.quantize(config)
