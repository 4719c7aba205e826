"""Relative paths are refused where a configuration travels."""

import pytest

from astro.errors import ConfigError
from astro_dist.config.cluster_paths import require_absolute_paths
from astro_dist.config.schema import RunConfig


def config(source="/models/x", output="/runs/r", text="python-docs", cache=None, local=None):
    return RunConfig.model_validate(
        {
            "model": {"source": source, "cache_dir": cache},
            "output": {"dir": output, "activations_dir": local},
            "calibration": {"source": text},
        }
    )


@pytest.mark.parametrize("source", ["/models/x", "~/x", "org/name", "s3://bucket/x", "demo:smollm2-135m"])
def test_what_every_machine_understands_passes(source):
    require_absolute_paths(config(source))


@pytest.mark.parametrize("text", ["python-docs", "/data/a.jsonl", "wikitext", "org/name"])
def test_text_that_every_machine_finds_passes(text):
    require_absolute_paths(config(text=text))


def test_one_relative_path_of_several_texts_is_refused():
    sources = [{"source": "org/name", "share": 0.5}, {"source": "data/a.jsonl", "share": 0.5}]
    content = {"model": {"source": "/m"}, "output": {"dir": "/r"}, "calibration": {"sources": sources}}
    with pytest.raises(ConfigError, match=r"^calibration.sources.1.source: data/a.jsonl is relative"):
        require_absolute_paths(RunConfig.model_validate(content))


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"output": "runs/r"}, "output.dir"),
        ({"source": "./x"}, "model.source"),
        ({"source": "x"}, "model.source"),
        ({"source": "a/b/c"}, "model.source"),
        ({"text": "text.txt"}, "calibration.source"),
        ({"cache": "cache"}, "model.cache_dir"),
        ({"local": "local"}, "output.activations_dir"),
    ],
)
def test_relative_path_is_refused_by_its_key(changed, key):
    with pytest.raises(ConfigError, match=f"^{key}: .* is relative"):
        require_absolute_paths(config(**changed))


def test_folder_with_the_name_of_a_repository_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="^model.source: org/name is relative"):
        require_absolute_paths(config("org/name"))
