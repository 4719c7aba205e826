"""A finished run on its way to a Hub on loopback: one commit or none, whatever happens; what is there is as here."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import astro
from astro.errors import AstroError, ConfigError, InputError, RunError
from astro_dist import cli
from astro_dist.config.schema import PublishConfig
from astro_dist.export.finished_run import FinishedRun
from astro_dist.export.inventory import read_inventory, write_inventory
from astro_dist.export.verify import verify_model
from astro_dist.publish import publication
from astro_dist.publish.publication import publish_run
from astro_dist.report.status import read_status
from tests.support.hub import TOKEN
from tests.support.models import files_of
from tests.support.publish_faults import AGAIN, FAULTS, published

ROOT = Path(__file__).parents[3]
TARGET = PublishConfig(repo="org/model")


def grow(run, count):
    """Give a finished model more shards, of random bytes."""
    opened = FinishedRun.open(run).run
    names = [file.name for file in read_inventory(opened)]
    more = [f"model-x{number:03d}.safetensors" for number in range(count - len(names))]
    for name in more:
        (run / "model" / name).write_bytes(random.Random(name).randbytes(40_000))
    write_inventory(opened, [*names, *more], {})


def test_model_goes_to_a_private_repository_in_one_commit(online_hub, finished):
    entry = publish_run(finished, TARGET)
    assert published(online_hub, "org/model") == files_of(finished / "model", with_card=True)
    assert online_hub.private == {"org/model"}
    assert [commit[:2] for commit in online_hub.commits] == [("org/model", "main")]
    assert entry.commit == online_hub.folder("org/model", "main")[0]
    assert json.loads((finished / "summary.json").read_text())["publish"] == entry.to_json()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.label)
def test_fault(online_hub, finished, fault):
    online_hub.write_faults[fault.kind] = list(fault.meets)
    if fault.code:
        with pytest.raises(InputError if fault.code == 2 else RunError, match=fault.message):
            publish_run(finished, TARGET)
        assert online_hub.commits == []
        online_hub.write_faults.clear()
    publish_run(finished, TARGET)
    assert not any(online_hub.write_faults.values()), "the fault was not met"
    assert len(online_hub.commits) == 1
    assert published(online_hub, "org/model") == files_of(finished / "model", with_card=True)


def test_server_that_asks_to_wait_is_waited_for(online_hub, finished):
    online_hub.write_faults["put"] = [(429, {"Retry-After": "7"})]
    online_hub.write_faults["commit"] = [(429, {"Retry-After": "9"})]
    publish_run(finished, TARGET)
    assert online_hub.client_waits == [8.0]
    assert online_hub.own_waits == [9.0]


def test_waits_grow_until_it_is_enough(online_hub, finished):
    online_hub.write_faults["commit"] = [503] * 99
    with pytest.raises(RunError, match="making the commit: the Hub answers 503: .* \\(tried 5 times\\)"):
        publish_run(finished, TARGET)
    assert online_hub.own_waits == [2.0, 4.0, 8.0, 16.0, 32.0]


def test_repeated_it_sends_nothing_and_commits_nothing(online_hub, finished):
    first = publish_run(finished, TARGET)
    sent = online_hub.uploaded
    assert publish_run(finished, TARGET).commit == first.commit
    assert (online_hub.uploaded, len(online_hub.commits)) == (sent, 1)


def test_after_a_failure_only_what_is_missing_is_sent(online_hub, finished):
    online_hub.write_faults["batch"] = [None, None, 403]
    with pytest.raises(RunError, match=AGAIN):
        publish_run(finished, TARGET)
    publish_run(finished, TARGET)
    shards = sum(path.stat().st_size for path in (finished / "model").glob("*.safetensors"))
    assert online_hub.uploaded == shards


def test_object_that_the_hub_has_dropped_is_sent_again(online_hub, finished):
    online_hub.write_faults["commit"] = [403]
    with pytest.raises(RunError, match=AGAIN):
        publish_run(finished, TARGET)
    dropped = sorted(online_hub.objects.iterdir())[0]
    size, sent = dropped.stat().st_size, online_hub.uploaded
    dropped.unlink()
    publish_run(finished, TARGET)
    assert online_hub.uploaded == sent + size
    assert published(online_hub, "org/model") == files_of(finished / "model", with_card=True)


def test_hub_that_does_not_hold_what_it_took(online_hub, finished, monkeypatch):
    handler = online_hub._server.RequestHandlerClass
    monkeypatch.setattr(handler, "keep", lambda self, oid, parts: True)
    monkeypatch.setattr(handler, "verify", lambda self, body, repository: {})
    with pytest.raises(RunError, match="the Hub took model-00001-of-00004.safetensors and says that it does not hold"):
        publish_run(finished, TARGET)
    assert online_hub.commits == []


def test_commit_that_holds_other_bytes_is_found(online_hub, finished, monkeypatch):
    handler = online_hub._server.RequestHandlerClass
    real = handler.publish_commit

    def publish_commit(self, repository, revision, folder, lfs, title):
        (folder / "config.json").write_text("{}")
        return real(self, repository, revision, folder, lfs, title)

    monkeypatch.setattr(handler, "publish_commit", publish_commit)
    with pytest.raises(
        RunError, match="the commit was made, but 1 files in it are not those .* the first is config.json"
    ):
        publish_run(finished, TARGET)


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "config.json"])
def test_file_that_is_not_as_it_was_written_is_not_published(online_hub, finished, name):
    path = finished / "model" / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(
        RunError, match=f"{name}: its SHA-256 is not that of its record.* `astro-dist quantize` makes it"
    ):
        publish_run(finished, TARGET)
    assert online_hub.commits == []


def test_file_that_is_gone_is_told_before_the_hub_is_asked(online_hub, finished):
    (finished / "model" / "config.json").unlink()
    with pytest.raises(ConfigError, match="1 files of the model are gone .* config.json; `astro-dist quantize`"):
        publish_run(finished, TARGET)
    assert not online_hub.requests


def test_model_of_thirty_files(online_hub, finished):
    grow(finished, 30)
    assert publish_run(finished, TARGET).num_files == 30
    assert published(online_hub, "org/model") == files_of(finished / "model", with_card=True)
    assert len(online_hub.commits) == 1


def command(run, hub, *flags):
    environment = {
        **os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
    }  # fmt: skip
    arguments = [sys.executable, "-m", "astro_dist", "--debug", "publish", str(run), "--repo", "org/model", *flags]
    return subprocess.Popen(
        arguments, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_process_that_is_killed_goes_on(online_hub, finished):
    grow(finished, 14)
    online_hub.bytes_per_s = 300_000
    process = command(finished, online_hub)
    while len(list(online_hub.objects.iterdir())) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert not [text for text in process.communicate() if TOKEN in text]
    held = {path.name for path in online_hub.objects.iterdir()}
    assert online_hub.commits == []
    online_hub.bytes_per_s = None
    online_hub.parts.clear()
    publish_run(finished, TARGET)
    sent = {oid for oid, _ in online_hub.parts}
    shards = {sha for name, sha in files_of(finished / "model").items() if name.endswith(".safetensors")}
    assert not sent & held
    assert sent < shards
    assert len(online_hub.commits) == 1
    assert published(online_hub, "org/model") == files_of(finished / "model", with_card=True)


def both(*runs):
    """Publish at once; what each came to."""
    ended = []

    def one(run):
        try:
            ended.append(publish_run(run, TARGET).commit)
        except AstroError as error:
            ended.append(str(error))

    threads = [threading.Thread(target=one, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def test_two_publishers_of_one_run(online_hub, finished):
    ended = both(finished, finished)
    assert len(online_hub.commits) == 1
    assert sum("another process is at work on this run" in text for text in ended) <= 1


def test_two_publishers_of_equal_models_make_one_commit(online_hub, finished, tmp_path):
    online_hub.bytes_per_s = 1_000_000
    ended = both(finished, shutil.copytree(finished, tmp_path / "other"))
    assert len(online_hub.commits) == 1
    assert ended == [online_hub.folder("org/model", "main")[0]] * 2


def test_two_publishers_of_different_models_are_told_of_each_other(online_hub, finished, tmp_path, monkeypatch):
    other = shutil.copytree(finished, tmp_path / "other")
    shard = other / "model" / "model-00002-of-00004.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(shard).items()}, shard)
    opened = FinishedRun.open(other).run
    write_inventory(opened, [file.name for file in read_inventory(opened)], {})
    barrier, real = threading.Barrier(2), publication.HubWriter.commit
    monkeypatch.setattr(
        publication.HubWriter, "commit", lambda self, *args: (barrier.wait() and None) or real(self, *args)
    )
    ended = both(finished, other)
    assert len(online_hub.commits) == 1
    assert sum("someone else has committed there" in text for text in ended) == 1
    assert published(online_hub, "org/model") in (
        files_of(finished / "model", with_card=True),
        files_of(other / "model", with_card=True),
    )


def test_revision_is_a_branch_that_is_made(online_hub, finished):
    publish_run(finished, PublishConfig(repo="org/model", revision="w4/g32"))
    assert published(online_hub, "org/model", "w4/g32") == files_of(finished / "model", with_card=True)
    assert published(online_hub, "org/model") == {}


@pytest.mark.parametrize("meets", [[], [504], [("after", 504)], [("after", "cut")]])
def test_pull_request_is_opened_once(online_hub, finished, tmp_path, meets):
    (tmp_path / "theirs").mkdir()
    online_hub.publish("them/model", tmp_path / "theirs")
    online_hub.write_faults["commit"] = meets
    for _ in range(2):
        entry = publish_run(finished, PublishConfig(repo="them/model", pull_request=True))
        assert entry.revision == "refs/pr/1"
    assert online_hub.requests == [("them/model", f"llama, 4 bits (astro-dist {astro.__version__})")]
    assert published(online_hub, "them/model", "refs/pr/1") == files_of(finished / "model", with_card=True)
    assert published(online_hub, "them/model") == {}


def test_finished_run_goes_to_a_second_place_too(online_hub, finished):
    publish_run(finished, TARGET)
    publish_run(finished, PublishConfig(repo="me/other", private=False))
    assert online_hub.private == {"org/model"}
    assert "vllm serve me/other" in (finished / "model" / "README.md").read_text()
    assert published(online_hub, "me/other") == files_of(finished / "model", with_card=True)
    places = {place.place: place.files for place in read_status(finished).publish}
    assert places == {"org/model@main": 10, "me/other@main": 10}


def test_published_model_is_verified_by_ranges(online_hub, finished, first_run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    commit = publish_run(finished, TARGET).commit
    there = verify_model(f"org/model@{commit}", first_run.parent / "llama")
    here = verify_model(finished / "model", first_run.parent / "llama")
    assert there == dataclasses.replace(here, model=f"org/model@{commit[:12]}", checksums_compared=False)


def test_token_is_nowhere(online_hub, finished, capsys, monkeypatch):
    online_hub.write_faults["commit"] = [403]
    online_hub.write_faults["put"] = [None] + [403] * 99
    for end in (1, 1, 0):
        monkeypatch.setattr(sys, "argv", ["astro-dist", "--debug", "publish", str(finished), "--repo", "org/model"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == end
        out, err = capsys.readouterr()
        assert ("Traceback" in err) == bool(end)
        assert TOKEN not in out + err
        online_hub.write_faults["put"].clear()
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert online_hub.tokens == {"hub": {f"Bearer {TOKEN}", None}, "store": {None}}


def test_status_tells_what_the_hub_holds_and_what_it_refuses(online_hub, finished):
    online_hub.write_faults["batch"] = [None, None, 403]
    with pytest.raises(RunError, match=AGAIN):
        publish_run(finished, TARGET)
    status = read_status(finished).to_json()
    assert list(status["publish"]) == [{"place": "org/model@main", "files": 2, "total": 10, "commit": None}]
    assert "the Hub answers 403" in status["upload_failures"][0]["cause"]
    commit = publish_run(finished, TARGET).commit
    status = read_status(finished).to_json()
    assert list(status["publish"]) == [{"place": "org/model@main", "files": 10, "total": 10, "commit": commit}]
    assert status["upload_failures"] == []


def test_run_that_is_not_finished(online_hub, finished):
    (finished / "summary.json").unlink()
    with pytest.raises(ConfigError, match="its run is not finished; `astro-dist quantize` goes on with it"):
        publish_run(finished, TARGET)
