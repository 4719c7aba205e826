"""A tiny training, and what it said of itself."""

import json

import pytest
import transformers

from astro_dist.config.training import TrainConfig
from tests.support.models import LLAMA, byte_tokenizer

SIZES = {**LLAMA, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture
def source(tmp_path):
    """A folder with a config and a tokenizer, and no weights."""
    folder = tmp_path / "source"
    transformers.LlamaConfig(**SIZES, eos_token_id=257).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(source, tmp_path):
    def make(output="training", **changes):
        content = {
            "model": {"source": str(source)},
            "text": {"sequence_length": 32},
            "optimization": {
                "steps": 6, "batch_sequences": 4, "micro_batch_sequences": 2, "learning_rate": 1e-2, "warmup_steps": 2,
            },
            "execution": {"executor": "local", "device": "cpu", "compile": False},
            "output": {"dir": str(tmp_path / output), "checkpoint_every": 2, "report_every": 1},
        }  # fmt: skip
        for name, value in changes.items():
            section, key = name.split("__")
            content.setdefault(section, {})[key] = value
        return TrainConfig.model_validate(content)

    return make


@pytest.fixture
def events():
    """The events of a training of one kind."""

    def read(config, kind="step"):
        lines = (config.output.dir / "progress.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    return read
