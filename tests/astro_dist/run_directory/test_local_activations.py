"""Activations on a node's local disk: the same result, and where they are lost they are computed again."""

import json
import shutil

import pytest
import torch

from astro.errors import ConfigError, NumericalError, RunError
from astro.storage.checked_tensors import load_part, save_part
from astro_dist import pipeline
from astro_dist.run_directory.local_activations import local_activations, open_activations, require_same_activations
from astro_dist.worker.worker import Worker
from tests.support.models import files_of


def stop_at_block_1(run, monkeypatch):
    """Lets a run end in the middle, before its second block is solved."""
    real = Worker.solve_block

    def solve(self, call):
        if call.block == 1:
            raise NumericalError("stopped")
        return real(self, call)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "solve_block", solve)
        with pytest.raises(NumericalError, match="stopped"):
            run()


@pytest.fixture
def quantize(run_config, tmp_path):
    def run(**changes):
        return pipeline.quantize(run_config(output__activations_dir=str(tmp_path / "local"), **changes))

    return run


def test_result_is_the_same_and_nothing_is_left(quantize, run_config, tmp_path, monkeypatch):
    pipeline.quantize(run_config(output__dir=str(tmp_path / "plain")))
    seen, real = [], Worker.forward

    def forward(self, call):
        real(self, call)
        seen.append(
            (len(list((tmp_path / "local").rglob("c*.safetensors"))), (tmp_path / "run/activations/original").exists())
        )

    monkeypatch.setattr(Worker, "forward", forward)
    quantize()
    assert max(number for number, _ in seen) > 2
    assert not any(in_run for _, in_run in seen)
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "plain" / "model")
    assert not list((tmp_path / "local").iterdir())
    assert "activations_dir" not in (tmp_path / "run" / "model" / "README.md").read_text(), "it is a private place"


@pytest.mark.parametrize("loss", ["lost", "left out", "kept"])
def test_run_goes_on_whatever_became_of_them(quantize, run_config, tmp_path, monkeypatch, loss):
    pipeline.quantize(run_config(output__dir=str(tmp_path / "plain")))
    stop_at_block_1(quantize, monkeypatch)
    if loss == "lost":
        shutil.rmtree(tmp_path / "local")
    if loss == "left out":
        pipeline.quantize(run_config())
    else:
        quantize()
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "plain" / "model")
    events = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    damaged = [event["reason"] for event in events if event["event"] == "damaged"]
    assert len(damaged) == (loss == "lost")
    assert all("is missing; what was in it and is still needed is computed again" in reason for reason in damaged)


def test_run_that_begins_anew_uses_nothing_of_before(quantize, run_config, tmp_path, monkeypatch):
    pipeline.quantize(run_config(output__dir=str(tmp_path / "plain")))
    stop_at_block_1(quantize, monkeypatch)
    shutil.rmtree(tmp_path / "run")
    stale = [path for path in (tmp_path / "local").rglob("c*.safetensors") if path.parent.name == "0001"]
    for path in stale:
        save_part(path, {name: torch.zeros_like(tensor) for name, tensor in load_part(path)[0].items()})
    assert stale
    quantize()
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "plain" / "model")


def test_every_run_has_a_folder_of_its_own(tmp_path):
    folders = {local_activations(tmp_path, root, key) for root in (tmp_path / "a", tmp_path / "b") for key in "xy"}
    assert len(folders) == 4


def test_worker_on_another_node_is_refused(tmp_path):
    stamp, is_lost = open_activations(tmp_path / "here", is_new=True)
    assert not is_lost
    require_same_activations(tmp_path / "here", stamp)
    with pytest.raises(RunError, match="does not see the driver's .*/there; output.activations_dir"):
        require_same_activations(tmp_path / "there", stamp)
    open_activations(tmp_path / "here", is_new=False)
    with pytest.raises(RunError, match="does not see"):
        require_same_activations(tmp_path / "here", stamp)  # of an earlier start, on a node that the driver left


def test_folder_that_cannot_be_written_is_wrong_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output.activations_dir: .*cannot be written"):
        open_activations(tmp_path / "file" / "x", is_new=True)
