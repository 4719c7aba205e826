"""What several tests of runs share: a Hub on loopback, a finished run."""

import shutil

import huggingface_hub.constants
import pytest
import transformers

from astro_dist import pipeline
from astro_dist.config.schema import RunConfig
from astro_dist.publish import background_upload, publication
from astro_dist.source import backoff
from tests.support.hub import TOKEN, clock
from tests.support.hub_server import HubServer
from tests.support.models import LLAMA, write_checkpoint


@pytest.fixture
def online_hub(monkeypatch):
    """A Hub that this process takes for the real one. Nobody waits: how long the client and we would have is noted."""
    server, template = HubServer(), "/{repo_id}/resolve/{revision}/{filename}"
    server.client_waits, server.own_waits = [], []
    settings = {
        "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + template,
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock(server.client_waits))
    for module in (backoff, publication):
        monkeypatch.setattr(module, "time", clock(server.own_waits))
    monkeypatch.setattr(background_upload, "_BACKOFF", backoff.Backoff(first_s=0.01, longest_s=300.0))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


@pytest.fixture
def dataset_hub(online_hub, monkeypatch, tmp_path):
    """A Hub that serves datasets too, to an empty cache."""
    import datasets  # slow to import, and needed by few tests

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", online_hub.address)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return online_hub


@pytest.fixture(scope="session")
def first_run(tmp_path_factory):
    """A finished run of the tiny Llama; never changed."""
    folder = tmp_path_factory.mktemp("first")
    source = write_checkpoint(folder / "llama", transformers.LlamaConfig(**LLAMA))
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n# Llama\n")
    config = {
        "model": {"source": str(source), "name": "org/llama"}, "quantization": {"group_size": 32},
        "regularizer": {"iterations": 3},
        "calibration": {"samples": 6, "sequence_length": 48, "chunk_samples": 4, "holdout_samples": 3},
        "execution": {"executor": "local", "workers": 1, "device": "cpu"}, "output": {"dir": str(folder / "run")},
    }  # fmt: skip
    pipeline.quantize(RunConfig.model_validate(config))
    return folder / "run"


@pytest.fixture
def finished(first_run, tmp_path):
    """A finished run of one's own."""
    return shutil.copytree(first_run, tmp_path / "finished")
