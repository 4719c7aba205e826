"""Remote sources: a Hub on loopback and other stores give the bytes that a folder gives, and say what is wrong."""

import contextlib
import json
import shutil
import threading
import time

import huggingface_hub.constants
import pyarrow.fs
import pytest
import torch
from moto.server import ThreadedMotoServer

from astro.errors import CheckpointError, ConfigError
from astro.storage.checkpoint import Checkpoint
from astro_dist import pipeline
from astro_dist.config.schema import ModelConfig
from astro_dist.export.verify import verify_model
from astro_dist.planning.validate import prepare
from astro_dist.source import backoff, object_store, remote_store
from astro_dist.source.hub_errors import asked_wait_s
from astro_dist.source.range_cache import RangeCache
from astro_dist.source.resolve import resolve_source
from astro_dist.worker.worker import Worker
from tests.support.hub import TOKEN, clock
from tests.support.models import files_of


@pytest.fixture
def hub(online_hub, llama):
    online_hub.publish("org/llama", llama)
    return online_hub


@pytest.fixture
def remote_config(run_config, tmp_path):
    def build(source="org/llama", **changes):
        return run_config(model__source=source, model__cache_dir=str(tmp_path / "cache"), **changes)

    return build


@pytest.fixture
def expected(run_config, tmp_path):
    pipeline.quantize(run_config(output__dir=str(tmp_path / "local")))
    return files_of(tmp_path / "local" / "model")


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_run_from_the_hub_writes_the_bytes_of_a_local_run_and_fetches_each_tensor_once(
    hub, remote_config, expected, tmp_path, llama
):
    summary = pipeline.quantize(remote_config(execution__workers=2))
    assert files_of(tmp_path / "run" / "model") == expected
    shards = sum(path.stat().st_size for path in llama.glob("*.safetensors"))
    fetched = [(file, asked) for file, asked in hub.file_requests if file.endswith(".safetensors")]
    assert len(fetched) == len(set(fetched)), "a piece was fetched twice"
    heads = sum(stop - start + 1 for file, (start, stop) in fetched if start == 0)
    assert sum(stop - start + 1 for _, (start, stop) in fetched) - heads <= shards
    assert summary.bytes_read > 0


@pytest.mark.parametrize("mode", ["blocks", "sequential"])
def test_what_lies_outside_the_blocks_is_fetched_once(hub, remote_config, monkeypatch, mode):
    """Without any cache: the perplexities are measured with what was copied."""
    asked, real = [], Worker.evaluate_loss
    monkeypatch.setattr(
        Worker, "evaluate_loss", lambda self, call: asked.append(len(hub.file_requests)) or real(self, call)
    )
    pipeline.quantize(remote_config(model__cache_gb=0.0, execution__mode=mode))
    assert asked == [len(hub.file_requests)] * 2


def test_token_is_used_at_the_hub_and_nowhere_else(hub, remote_config, tmp_path):
    pipeline.quantize(remote_config())
    assert hub.tokens == {"hub": {f"Bearer {TOKEN}"}, "store": {None}}
    written = [path for folder in ("run", "cache") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_cache_never_holds_more_than_its_bound(hub, remote_config, expected, tmp_path):
    pieces, largest, ended = tmp_path / "cache" / "pieces", [], threading.Event()

    def watch():
        while not ended.wait(0.002):
            # What goes while it is looked at is not counted; what is new may be, but only after room was made for it.
            with contextlib.suppress(OSError):
                largest.append(sum(path.stat().st_size for path in pieces.iterdir() if path.is_file()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        pipeline.quantize(remote_config(model__cache_gb=60e-6, execution__workers=2))
    finally:
        ended.set()
        watcher.join()
    assert 0 < max(largest) <= 60_000
    assert files_of(tmp_path / "run" / "model") == expected


def test_failures_that_pass_are_tried_again(hub, remote_config, expected, tmp_path):
    hub.faults = [None, 503, "cut", None, 500, 429, 504, "cut", "cut", None, 502]
    pipeline.quantize(remote_config())
    assert not hub.faults
    assert files_of(tmp_path / "run" / "model") == expected


def test_hub_is_asked_once_for_the_place_of_a_file_until_that_expires(hub, tmp_path, llama, monkeypatch):
    monkeypatch.setattr(backoff, "time", clock([]))
    source = resolve_source(ModelConfig(source="org/llama", cache_gb=0.0, cache_dir=tmp_path / "cache"))
    checkpoint = Checkpoint.open(source.store)
    for _ in range(3):
        checkpoint.read(checkpoint.entries)
    shards = [file for file in hub.resolved if file.endswith(".safetensors")]
    assert len(shards) == len(set(shards)) == len(list(llama.glob("*.safetensors")))
    hub.faults = [403]
    name = next(iter(checkpoint.entries))
    assert torch.equal(checkpoint.read([name])[name], Checkpoint.open(llama).read([name])[name])
    assert len(hub.resolved) - len(set(hub.resolved)) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"RateLimit": '"resolvers";r=0;t=55'}, 55),
        ({"RateLimit": '"resolvers";r=7;t=55'}, 0),
        ({"Retry-After": "soon"}, 0),
        ({}, 0),
    ],
)
def test_server_says_how_long_to_wait(headers, seconds):
    assert asked_wait_s(headers) == seconds


def test_failure_that_does_not_pass_names_the_file_and_the_reason(hub, remote_config, monkeypatch):
    monkeypatch.setattr(remote_store, "_BACKOFF", backoff.Backoff(first_s=0.01, longest_s=30.0, patience_s=0.05))
    hub.faults = [503] * 1000
    message = r"org/llama@\w{12}/config.json: bytes 0 to \d+ cannot be fetched, tried \d+ times .* the Hub answers 503"
    with pytest.raises(CheckpointError, match=message):
        prepare(remote_config())


def test_range_that_was_not_asked_for_is_refused(hub, tmp_path):
    source = resolve_source(ModelConfig(source="org/llama", cache_dir=tmp_path / "cache"))
    checkpoint = Checkpoint.open(source.store)
    hub.shift = 8
    with pytest.raises(CheckpointError, match="asked for bytes .*, the server sends bytes .*; the file is another one"):
        checkpoint.read(checkpoint.entries)


def test_other_revision_than_the_runs_is_refused(hub, remote_config, tmp_path, llama):
    pipeline.quantize(remote_config())
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    commit = hub.publish("org/llama", other)
    with pytest.raises(ConfigError, match="holds another run .*commit"):
        pipeline.quantize(remote_config(model__revision=commit))


def test_relative_cache_is_refused(run_config):
    with pytest.raises(ConfigError, match="model.cache_dir: cache is relative"):
        prepare(run_config(model__cache_dir="cache"))


def test_run_keeps_the_commit_that_it_began_with(hub, remote_config, expected, tmp_path, monkeypatch, llama):
    first = hub.folder("org/llama", "main")[0]
    real = pipeline.assemble
    monkeypatch.setattr(pipeline, "assemble", lambda *args, **flags: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(remote_config())
    other = tmp_path / "other"
    other.mkdir()
    hub.publish("org/llama", other)
    monkeypatch.setattr(pipeline, "assemble", real)
    pipeline.quantize(remote_config())
    assert files_of(tmp_path / "run" / "model") == expected
    assert json.loads((tmp_path / "run" / "run.json").read_text())["commit"] == first


def test_commit_can_be_asked_for(hub, remote_config, tmp_path):
    first = hub.folder("org/llama", "main")[0]
    hub.publish("org/llama", tmp_path)
    assert prepare(remote_config(model__revision=first)).source.commit == first


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("org/llama", "v2", "Invalid rev id: v2.*; it has no branch, tag or commit 'v2'; correct the revision"),
        ("org/nothing", None, "Repository not found.*; there is no such folder here either; correct the name"),
        (
            "org/gated",
            None,
            "Access to model org/gated is restricted.*; ask for access at https://huggingface.co/org/gated",
        ),
    ],
)
def test_what_the_hub_refuses_is_told_with_its_reason(hub, remote_config, source, revision, message):
    hub.gated.add("org/gated")
    with pytest.raises(CheckpointError, match=f"the Hub refuses: .*{message}"):
        prepare(remote_config(source, model__revision=revision))


def test_hub_that_is_not_there(hub, remote_config):
    hub.close()
    with pytest.raises(
        CheckpointError, match="org/llama: no such folder here, and the Hub cannot be reached: .*; correct the name"
    ):
        prepare(remote_config())


def test_hub_that_shall_not_be_asked(remote_config, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match="org/llama: no such folder here, and the Hub is not asked: HF_HUB_OFFLINE is set"
    ):
        prepare(remote_config())


def test_server_without_ranges_is_refused(hub, remote_config):
    hub.ranges = False
    with pytest.raises(CheckpointError, match="the server does not send byte ranges"):
        prepare(remote_config())


def test_revision_of_a_folder_is_refused(run_config):
    with pytest.raises(ConfigError, match="model.revision: only a Hub repository has revisions"):
        prepare(run_config(model__revision="main"))


def test_a_run_directory_is_no_model_and_the_message_names_its_result(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"is a run directory and no model; its result is {tmp_path}/model"):
        resolve_source(ModelConfig(source=str(tmp_path)))


def test_repository_that_holds_pickles_is_refused(hub, remote_config, tmp_path):
    folder = tmp_path / "pickles"
    folder.mkdir()
    for file in ("config.json", "pytorch_model.bin"):
        (folder / file).write_text("{}")
    hub.publish("org/pickles", folder)
    with pytest.raises(CheckpointError, match=r"org/pickles@\w+: holds pytorch_model.bin but no safetensors"):
        prepare(remote_config("org/pickles"))


def test_all_files_of_a_repository_but_weights_are_fetched_and_no_code_runs(hub, tmp_path, llama):
    (llama / "modeling_llama.py").write_text("raise SystemExit")
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    (llama / "original").mkdir()
    for file in ("consolidated.00.pth", "params.json"):
        (llama / "original" / file).write_text("{}")
    hub.publish("org/more", llama)
    source = resolve_source(ModelConfig(source="org/more", cache_dir=tmp_path / "cache"))
    fetched = {path.relative_to(source.folder).as_posix() for path in source.folder.rglob("*") if path.is_file()}
    assert fetched >= {"config.json", "tokenizer.json", "modeling_llama.py", "additional_chat_templates/tool_use.jinja"}
    assert not any("safetensors" in file or file.startswith("original") for file in fetched)


def test_a_run_from_the_hub_keeps_files_in_folders(hub, remote_config, tmp_path, llama):
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    hub.publish("org/more", llama)
    pipeline.quantize(remote_config("org/more"))
    assert (tmp_path / "run" / "model" / "additional_chat_templates" / "tool_use.jinja").read_text() == "TOOLS"
    inventory = json.loads((tmp_path / "run" / "model.json").read_text())["files"]
    assert "additional_chat_templates/tool_use.jinja" in [file["name"] for file in inventory]
    assert verify_model(tmp_path / "run" / "model").checksums_compared


def test_run_from_a_url_writes_the_bytes_of_a_local_run(remote_config, expected, tmp_path, llama):
    pipeline.quantize(remote_config(f"file://{llama}", execution__workers=2))
    assert files_of(tmp_path / "run" / "model") == expected


@pytest.fixture
def bucket(monkeypatch, llama):
    """The model in S3, as moto plays it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "{}:{}".format(*server.get_host_and_port())
    secrets = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": TOKEN, "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    options = {"endpoint_override": address, "scheme": "http", "region": "us-east-1"}
    system = pyarrow.fs.S3FileSystem(**options, allow_bucket_creation=True)
    system.create_dir("models")
    for path in llama.iterdir():
        with system.open_output_stream(f"models/llama/{path.name}") as stream:
            stream.write(path.read_bytes())
    yield "s3://models/llama?" + "&".join(f"{name}={value}" for name, value in options.items())
    object_store._file_system.cache_clear()
    server.stop()


def test_run_from_s3_writes_the_bytes_of_a_local_run(bucket, remote_config, expected, tmp_path):
    pipeline.quantize(remote_config(bucket))
    assert files_of(tmp_path / "run" / "model") == expected
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_bucket_that_is_not_there(bucket, remote_config):
    with pytest.raises(CheckpointError, match="model.source s3://other/llama.*: cannot be listed: "):
        prepare(remote_config(bucket.replace("models", "other")))


def test_folder_behind_a_url_that_changes_is_another_source(llama, tmp_path):
    def revision():
        return resolve_source(ModelConfig(source=f"file://{llama}", cache_dir=tmp_path / "cache")).store.revision

    before = revision()
    assert revision() == before
    time.sleep(0.01)
    (llama / "config.json").write_text((llama / "config.json").read_text())
    assert revision() != before


def test_shard_behind_a_url_that_changes_under_a_run_is_found(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_store, "_PIECE_BYTES", 20_000)
    source = resolve_source(ModelConfig(source=f"file://{llama}", cache_dir=tmp_path / "cache"))
    checkpoint = Checkpoint.open(source.store)
    time.sleep(0.01)
    shard = sorted(llama.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes())
    with pytest.raises(CheckpointError, match="has changed, or is gone, since the run began"):
        checkpoint.read(checkpoint.entries)


def test_files_that_are_no_part_of_a_model_do_not_make_another_source(llama, tmp_path):
    model = ModelConfig(source=f"file://{llama}", cache_dir=tmp_path / "cache")
    before = resolve_source(model).store.revision
    (llama / "train.log").write_text("x")
    assert resolve_source(model).store.revision == before


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("s3://key:secret@bucket/model", ConfigError, "the URL may hold credentials"),
        ("https://host/model?sig=abc", ConfigError, "the URL may hold credentials"),
        ("s3://bucket/model?secret_key=abc", ConfigError, "the URL may hold credentials"),
        ("memory://model", CheckpointError, "memory://model: "),
        ("file:///nowhere/at/all", CheckpointError, "cannot be listed"),
        ("gopher://hole/model", ConfigError, "model.source gopher://hole/model: "),
    ],
)
def test_url_that_is_no_good(url, error, message, remote_config):
    with pytest.raises(error, match=message):
        prepare(remote_config(url))


def test_remote_tensors_are_those_of_the_folder(hub, tmp_path, llama, monkeypatch):
    monkeypatch.setattr(remote_store, "_PIECE_BYTES", 20_000)
    source = resolve_source(ModelConfig(source="org/llama", cache_dir=tmp_path / "cache"))
    here, there = Checkpoint.open(llama), Checkpoint.open(source.store)
    assert here.entries == there.entries
    found = there.read(there.entries)
    assert all(found[name].equal(tensor) for name, tensor in here.read(here.entries).items())


def test_cache_drops_what_was_not_used_for_longest(tmp_path):
    cache, fetched = RangeCache(tmp_path, 35), []

    def get(key):
        return cache.get(key, 6, lambda: fetched.append(key) or key.encode() * 6)

    for key in "abcab":
        get(key)
        time.sleep(0.01)
    assert fetched == ["a", "b", "c"]
    get("d")
    assert [get(key) for key in "abd"] == [b"a" * 6, b"b" * 6, b"d" * 6]
    assert fetched == ["a", "b", "c", "d"]
    get("c")
    assert fetched == ["a", "b", "c", "d", "c"]
    assert size_of(tmp_path) <= 35


def test_cached_piece_that_is_damaged_is_fetched_again(tmp_path):
    cache = RangeCache(tmp_path, 100)
    cache.get("a", 3, lambda: b"abc")
    (path,) = (path for path in tmp_path.iterdir() if path.is_file())
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert cache.get("a", 3, lambda: b"abc") == b"abc"
    assert path.read_bytes()[:3] == b"abc"


def test_piece_that_several_want_at_once_is_fetched_once(tmp_path):
    fetched = []

    def fetch():
        time.sleep(0.05)
        fetched.append(1)
        return b"abc"

    threads = [threading.Thread(target=RangeCache(tmp_path, 100).get, args=("a", 3, fetch)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [1]


def test_without_a_folder_that_can_be_used_pieces_are_handed_on(tmp_path):
    (tmp_path / "file").touch()
    assert RangeCache(tmp_path / "file", 100).get("a", 3, lambda: b"abc") == b"abc"
    assert RangeCache(tmp_path / "small", 2).get("a", 3, lambda: b"abc") == b"abc"
    assert size_of(tmp_path / "small") == 0
