"""Upload while a run goes on, and what fails there."""

import json
import time

import pytest

from astro.errors import RunError
from astro_dist import pipeline
from astro_dist.config.yaml_file import load_config
from astro_dist.report.status import read_status
from astro_dist.run_directory.records import RunDirectory
from astro_dist.worker.worker import Worker
from tests.support.models import files_of
from tests.support.publish_faults import AGAIN, published


def journal(root):
    return [json.loads(line) for line in (root / "journal.jsonl").read_text().splitlines()]


@pytest.fixture
def slow_solves(monkeypatch):
    """Blocks that take a little longer, so that the thread gets its turn."""
    real = Worker.solve_block
    monkeypatch.setattr(Worker, "solve_block", lambda self, call: time.sleep(0.2) or real(self, call))


def test_shards_go_up_while_later_blocks_are_solved(online_hub, run_config, tmp_path, slow_solves):
    summary = pipeline.quantize(run_config(publish__repo="org/model"))
    events = [(line["event"], line.get("unit", line.get("file"))) for line in journal(tmp_path / "run")]
    assert events.index(("uploaded", "model-00002-of-00004.safetensors")) < events.index(
        ("finished", "round-0-block-0002")
    )
    assert summary.publish.repository == "org/model"
    assert len(online_hub.commits) == 1
    assert published(online_hub, "org/model") == files_of(tmp_path / "run" / "model", with_card=True)


def test_only_shards_of_the_last_round_go_up(online_hub, run_config, tmp_path):
    pipeline.quantize(run_config(publish__repo="org/model", execution__rounds=2))
    assert published(online_hub, "org/model") == files_of(tmp_path / "run" / "model", with_card=True)
    assert {path.name for path in online_hub.objects.iterdir()} == {
        sha
        for name, sha in files_of(tmp_path / "run" / "model", with_card=True).items()
        if name.endswith(".safetensors")
    }


def test_upload_that_fails_does_not_stop_the_run(online_hub, run_config, tmp_path, slow_solves):
    online_hub.write_faults["batch"] = [403] * 1000
    with pytest.raises(RunError, match=f"the Hub answers 403.* The run itself is finished in .*{AGAIN}"):
        pipeline.quantize(run_config(publish__repo="org/model"))
    status = read_status(tmp_path / "run").to_json()
    assert status["state"] == "complete"
    failures = [line for line in status["upload_failures"] if line["event"] == "upload_failed"]
    assert "the Hub answers 403" in failures[0]["cause"]
    assert len(failures) > 1, "it was not tried again"
    assert online_hub.commits == []
    online_hub.write_faults.clear()
    assert pipeline.quantize(run_config(publish__repo="org/model")).publish.num_files == 10
    assert published(online_hub, "org/model") == files_of(tmp_path / "run" / "model", with_card=True)


def test_upload_that_fails_once_is_made_up_for(online_hub, run_config, tmp_path, slow_solves):
    online_hub.write_faults["put"] = [None, "cut"] + [None, 500] * 3
    pipeline.quantize(run_config(publish__repo="org/model"))
    assert published(online_hub, "org/model") == files_of(tmp_path / "run" / "model", with_card=True)


def test_run_that_is_stopped_has_uploaded_what_was_finished(online_hub, run_config, tmp_path, monkeypatch):
    real = Worker.solve_block

    def solve(self, call):
        if call.block == 2:
            time.sleep(1)
            raise KeyboardInterrupt
        return real(self, call)

    monkeypatch.setattr(Worker, "solve_block", solve)
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(run_config(publish__repo="org/model"))
    held, sent = len(list(online_hub.objects.iterdir())), online_hub.uploaded
    assert held >= 2
    assert online_hub.commits == []
    monkeypatch.setattr(Worker, "solve_block", real)
    pipeline.quantize(run_config(publish__repo="org/model"))
    shards = sum(path.stat().st_size for path in (tmp_path / "run" / "model").glob("*.safetensors"))
    assert online_hub.uploaded == shards > sent
    assert published(online_hub, "org/model") == files_of(tmp_path / "run" / "model", with_card=True)


def test_someone_elses_commit_during_a_run_is_not_overwritten(online_hub, run_config, tmp_path, monkeypatch, llama):
    real = pipeline.assemble
    monkeypatch.setattr(
        pipeline, "assemble", lambda *args, **flags: online_hub.publish("org/model", llama) and real(*args, **flags)
    )
    with pytest.raises(RunError, match="someone else has committed there"):
        pipeline.quantize(run_config(publish__repo="org/model"))
    assert online_hub.folder("org/model", "main")[1] == llama


def again(finished, *assignments):
    """The very run once more."""
    return load_config(finished / "config.yaml", [f"output.dir={finished}", *assignments])


def test_run_that_was_finished_without_publishing_is_published(online_hub, finished):
    key = json.loads((finished / "run.json").read_text())["key"]
    for repository in ("org/model", "me/other"):
        pipeline.quantize(again(finished, f"publish.repo={repository}"))
        assert published(online_hub, repository) == files_of(finished / "model", with_card=True)
    assert "quantized_by: me" in (finished / "model" / "README.md").read_text()
    assert RunDirectory(finished, key).finished("head-original"), "publishing is no part of a run's identity"


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00004.safetensors"])
def test_file_of_a_finished_model_that_is_damaged_is_made_anew(finished, name):
    before = files_of(finished / "model")
    (finished / "model" / name).write_text("damaged")
    pipeline.quantize(again(finished))
    assert files_of(finished / "model") == before
