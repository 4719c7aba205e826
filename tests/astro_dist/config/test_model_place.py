"""What the name of a model says of its place."""

import pytest

from astro.errors import CheckpointError
from astro_dist.config.model_place import likely_place, require_model


@pytest.fixture
def runs(tmp_path, monkeypatch):
    (tmp_path / "runs" / "llama-w4g128" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "llama.txt").write_text("")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("runs/llama-w4g12", "runs/llama-w4g128"),
        ("rums/llama-w4g128/model", "runs/llama-w4g128/model"),
        ("runs/llama-w4g64/model", "runs/llama-w4g128/model"),
        ("rums", "runs"),
    ],
)
@pytest.mark.usefixtures("runs")
def test_a_folder_that_may_be_meant_is_named(name, meant):
    assert likely_place(name) == f" (did you mean {meant}?)"


@pytest.mark.parametrize(
    "name",
    ["runs/mistral", "runs/llama.txt/model", "org/llama", "runs/llama-w4g128", "rums/nothing", "runs/llama-w4g12/none"],
)
@pytest.mark.usefixtures("runs")
def test_nothing_is_guessed_where_nothing_is_alike(name):
    assert likely_place(name) == ""


@pytest.mark.usefixtures("runs")
def test_a_path_that_is_wrong_is_refused_with_the_likely_one():
    with pytest.raises(CheckpointError, match=r"no such folder \(did you mean runs/llama-w4g128/model\?\); expected"):
        require_model("runs/llama-w4g64/model")
