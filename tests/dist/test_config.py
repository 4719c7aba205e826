"""One YAML is one whole run; a key that is not known is an error with its path."""

from pathlib import Path

import pytest

from astro.errors import ConfigError
from astro_dist.config import load_config, run_key

ROOT = Path(__file__).parents[2]
MINIMAL = "model: {source: x}\noutput: {dir: r}\n"


@pytest.fixture
def write(tmp_path):
    def build(text):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return path

    return build


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    assert load_config(path).output.dir


def test_resolved_config_reads_back_the_same(write):
    config = load_config(write(MINIMAL), ["quantization.bits=3", "quantization.ignore=[a.*, b]"])
    assert load_config(write(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "quantization: {bit: 3}", r"unknown key quantization.bit \(did you mean bits\?\)"),
        (MINIMAL + "regularizer: {gamma: 3}", "unknown key regularizer.gamma; known here: name, beta"),
        (MINIMAL + "excution: {}", r"unknown key excution \(did you mean execution\?\)"),
        (MINIMAL + "quantization: {bits: 5}", "quantization: bits: expected 2, 3, 4 or 8, got 5"),
        (MINIMAL + "calibration: {samples: 0}", "calibration.samples: .*got 0"),
        (MINIMAL + "execution: {workers: 0}", "workers: expected auto or at least 1, got 0"),
        (MINIMAL + "execution: {device: tpu}", "execution.device: .*got 'tpu'"),
        ("model: {source: x}", "output: Field required"),
        ("- 1", "expected a mapping of sections"),
        ("{", "cannot be read as YAML"),
    ],
)
def test_wrong_configs_are_explained(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(text))


def test_missing_file():
    with pytest.raises(ConfigError, match="nowhere.yaml: no such configuration file"):
        load_config(Path("nowhere.yaml"))


@pytest.mark.parametrize("assignment", ["bits", "=3", "quantization..bits=3", "model.source.x=1", "a=[", ".=1"])
def test_wrong_assignments_are_explained(write, assignment):
    with pytest.raises(ConfigError, match="--set"):
        load_config(write(MINIMAL), [assignment])


def test_key_ignores_where_a_run_happens_but_not_what_it_computes(write):
    base = load_config(write(MINIMAL))
    key = run_key(base, "f", "1")

    def other(assignment):
        return run_key(load_config(write(MINIMAL), [assignment]), "f", "1")

    assert other("execution.workers=7") == other("output.dir=elsewhere") == other("model.source=copy") == key
    changed = [other("quantization.bits=3"), other("execution.threads_per_worker=2"), other("calibration.seed=1")]
    changed += [run_key(base, "g", "1"), run_key(base, "f", "2")]
    assert len({key, *changed}) == 6
