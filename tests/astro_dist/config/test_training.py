"""Files of trainings: every sample is valid, wrong ones are explained, and so is every key."""

from pathlib import Path

import jsonschema
import pytest
import yaml

from astro.errors import ConfigError
from astro_dist.config.explanation import explain, json_schema
from astro_dist.config.training import TrainConfig
from astro_dist.config.yaml_file import load_train_config

SAMPLES = Path(__file__).parents[3] / "configs" / "training"


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_samples_are_valid_and_read_back(path, tmp_path):
    config = load_train_config(path)
    jsonschema.validate(yaml.safe_load(path.read_text()), json_schema(TrainConfig))
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_train_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {source: a}\noutput: {dir: b}", "optimization.steps: missing"),
        ("optimization: {steps: 5}\noutput: {dir: b}", "model.source: missing"),
        ("model: {source: a}\noptimization: {steps: many}\noutput: {dir: b}", "optimization.steps: expected a whole"),
        ("model: {source: a}\noptimization: {steps: yes}\noutput: {dir: b}", "optimization.steps: expected a number"),
        ("model: {source: a}\noptimisation: {steps: 5}\noutput: {dir: b}", r"did you mean optimization\?"),
        ("steps: 5", r"did you mean optimization.steps\?"),
        (
            "model: {source: a}\noptimization: {steps: 5}\noutput: {dir: b}\nregularization: {input_bits: 1}",
            "regularization.input_bits: expected 2 to 8",
        ),
    ],
)
def test_wrong_files_are_explained(text, message, tmp_path):
    (tmp_path / "train.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_train_config(tmp_path / "train.yaml")


def test_keys_are_explained():
    assert "shell patterns" in explain("regularization.layers", TrainConfig)
    assert "it must be given" in explain("optimization.steps", TrainConfig)
    with pytest.raises(ConfigError, match=r"no section 'quantization'"):
        explain("quantization.bits", TrainConfig)
