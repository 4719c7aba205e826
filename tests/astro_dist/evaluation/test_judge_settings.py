"""A model is judged where and as the user asks, or not at all."""

import pytest
import torch

from astro.errors import ConfigError
from astro_dist.config.calibration import TextSource
from astro_dist.evaluation.beside import TryRequest, continue_beside
from astro_dist.evaluation.inspection import InspectRequest, inspect_model
from astro_dist.evaluation.judge import JudgeRequest, judge
from astro_dist.evaluation.judge_settings import JudgeSettings


@pytest.mark.parametrize(
    "judges",
    [
        lambda name, settings: judge(name, JudgeRequest(tasks="piqa"), settings),
        lambda name, settings: inspect_model(
            name, InspectRequest(text=TextSource(source="python-docs", share=1.0)), settings
        ),
        lambda name, settings: continue_beside(name, TryRequest(prompt="a", against=name), settings, print, print),
    ],
)
def test_gpu_that_is_not_there_is_not_passed_over(llama, monkeypatch, judges):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("astro_dist.evaluation.judge.require_harness", lambda: None)
    with pytest.raises(ConfigError, match="--device cuda: torch sees no GPU here"):
        judges(str(llama), JudgeSettings(device="cuda"))
