"""A model is judged where and as the user asks, or not at all."""

import pytest

from astro.errors import ConfigError
from astro_dist.config.calibration import TextSource
from astro_dist.evaluation.beside import TryRequest, continue_beside
from astro_dist.evaluation.inspection import InspectRequest, inspect_model
from astro_dist.evaluation.judge import JudgeRequest, judge
from astro_dist.evaluation.judge_settings import JudgeSettings
from astro_dist.worker import device_check


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
@pytest.mark.parametrize(
    ("device", "begin"), [("cuda", "a GPU of this machine is asked for"), ("auto", "this machine has a GPU")]
)
def test_gpu_that_cannot_be_used_is_not_passed_over(llama, monkeypatch, judges, device, begin):
    monkeypatch.setattr(device_check, "has_gpu", lambda: True)
    monkeypatch.setattr(device_check, "gpu_trouble", lambda key: f"its driver is too old; set {key} cpu")
    monkeypatch.setattr("astro_dist.evaluation.judge.require_harness", lambda: None)
    with pytest.raises(ConfigError, match=f"^--device {device}: {begin}, but its driver is too old; set --device cpu$"):
        judges(str(llama), JudgeSettings(device=device))
