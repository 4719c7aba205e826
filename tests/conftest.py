"""Small real things for tests: correlated inputs, tiny checkpoints written by transformers itself, a byte tokenizer."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.devices import devices, on_device
from tests.support.models import LLAMA, write_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if "RAY_AUTH_MODE" not in os.environ:
    # Ray reads this when it is imported. A token of its own keeps tests out of the home folder.
    _token = Path(tempfile.mkdtemp(prefix="astro-test-")) / "token"
    _token.write_text("0123456789abcdef" * 4)
    _token.chmod(0o600)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(_token)}
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device on which a test makes its tensors."""
    device = torch.device(request.param)
    with on_device(device):
        yield device


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny Llama in several shards."""
    return write_checkpoint(tmp_path / "llama", transformers.LlamaConfig(**LLAMA))


@pytest.fixture
def run_config(llama: Path, tmp_path: Path) -> Callable[..., Any]:
    """Configurations of a short run on the tiny Llama; arguments are `section__key=value`."""
    from astro_dist.config.schema import RunConfig

    def build(**changes: Any) -> RunConfig:
        content: dict[str, Any] = {
            "model": {"source": str(llama)},
            "quantization": {"group_size": 32},
            "regularizer": {"iterations": 3},
            "calibration": {
                "samples": 6,
                "sequence_length": 48,
                "chunk_samples": 4,
                "holdout_samples": 3,
                "token_weights": "norm",
            },
            "execution": {"executor": "local", "workers": 1, "device": "cpu"},
            "output": {"dir": str(tmp_path / "run")},
        }
        for name, value in changes.items():
            section, key = name.split("__")
            content.setdefault(section, {})[key] = value
        return RunConfig.model_validate(content)

    return build
