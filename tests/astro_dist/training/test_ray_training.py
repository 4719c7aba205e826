"""Trainings on a real Ray cluster: two workers do what one does, and go on when one of them is killed."""

import errno
import os
import signal
import threading
import time
from unittest import mock

import pytest
import ray
import torch
from safetensors import safe_open

from astro.errors import ConfigError, NumericalError, StorageError, UnsupportedError
from astro.model.clips_file import CLIPS_FILE
from astro_dist.training import ray_training
from astro_dist.training.parallel import Place
from astro_dist.training.progress import in_line
from astro_dist.training.train import train
from astro_dist.training.training_directory import TrainingDirectory

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]  # Ray Train starts workers for half a minute


def storage_error(number):
    error = StorageError("it cannot be written")
    error.__cause__ = OSError(number, "it failed")
    return error


RAY = {"execution__executor": "ray", "optimization__micro_batch_sequences": 2}


@pytest.fixture(scope="module")
def cluster():
    """A private cluster of three CPUs on this machine."""
    ray.init(address="local", num_cpus=3, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
    yield
    ray.shutdown()


def tensors(config, file="model.safetensors"):
    with safe_open(config.output.dir / "model" / file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def require_close(one, other):
    for file in ("model.safetensors", CLIPS_FILE):
        expected, found = tensors(one, file), tensors(other, file)
        assert expected.keys() == found.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_train_as_one_does(cluster, settings, events, strategy):
    one, two = settings("one"), settings("two", **RAY, execution__workers=2, execution__strategy=strategy)
    train(one)
    train(two)
    assert events(two, "begun")[0]["workers"] == 2
    losses = [[event["loss"] for event in events(config)] for config in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    require_close(one, two)


def test_killed_worker_costs_the_steps_since_the_last_checkpoint(cluster, settings, events):
    whole = settings("whole", optimization__steps=30, output__checkpoint_every=10)
    cut = settings("cut", **RAY, execution__workers=2, optimization__steps=30, output__checkpoint_every=10)
    train(whole)
    killed = threading.Event()

    def kill():
        while not killed.is_set():
            if (cut.output.dir / "progress.jsonl").is_file() and events(cut, "checkpoint"):
                os.kill(events(cut, "begun")[0]["pid"], signal.SIGKILL)
                killed.set()
            time.sleep(0.02)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    summary = train(cut)
    assert killed.is_set()
    begun = [event["step"] for event in events(cut, "begun")]
    assert begun[0] == 0
    assert len(begun) == 2
    assert begun[1] >= 10
    assert summary.loss == pytest.approx(events(whole)[-1]["loss"], rel=1e-3)
    require_close(whole, cut)


def test_training_that_stopped_goes_on_with_other_workers_and_another_strategy(cluster, settings, events, monkeypatch):
    from astro_dist.training import train as module

    whole = settings("whole", optimization__steps=12)
    cut = settings("cut", **RAY, execution__workers=2, optimization__steps=12)
    train(whole)

    def stop_at_once(event):
        if event["event"] == "step":
            monkeypatch.setattr(module, "in_line", in_line)
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "in_line", stop_at_once)
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    monkeypatch.undo()
    kept = events(cut, "checkpoint")[-1]["step"]
    assert kept == events(cut)[-1]["step"], "no step is lost"
    again = settings("cut", **RAY, execution__workers=1, execution__strategy="fsdp", optimization__steps=12)
    train(again)
    assert events(again, "begun")[-1]["step"] == kept
    assert events(again, "begun")[-1]["workers"] == 1
    require_close(whole, again)


def test_loss_that_is_not_finite_is_not_tried_again(cluster, settings, events):
    config = settings(**RAY, optimization__learning_rate=1e30, regularization__input_bits=None)
    with pytest.raises(NumericalError, match=r"step \d: the loss is"):
        train(config)
    assert len(events(config, "begun")) == 1


def test_error_of_one_worker_ends_the_others_which_wait_for_it(cluster, settings):
    config = settings(**RAY, execution__workers=2, execution__max_retries=0)
    config.output.dir.mkdir()
    (config.output.dir / "progress.jsonl").mkdir()  # worker 0 alone writes there
    begin = time.monotonic()
    with pytest.raises(StorageError, match=r"progress\.jsonl"):
        train(config)
    assert time.monotonic() - begin < 60, "a worker waited for one that had ended"


@pytest.mark.parametrize(
    ("error", "is_noted"),
    [(UnsupportedError("no blocks"), True), (storage_error(errno.ENOSPC), True), (storage_error(errno.EIO), False)],
    ids=["input", "disk is full", "disk may be back"],
)
def test_only_what_would_come_again_is_told_to_the_driver(settings, events, tmp_path, monkeypatch, error, is_noted):
    def fail(*_):
        raise error

    monkeypatch.setattr(ray_training, "Trainer", fail)
    monkeypatch.setattr(ray_training, "Place", lambda *_: Place(0, 1, torch.device("cpu")))
    monkeypatch.setattr(ray.train, "get_context", mock.MagicMock())
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: "cpu")
    config, run = settings(), TrainingDirectory(tmp_path / "training")
    run.root.mkdir()
    with pytest.raises(type(error)):
        ray_training._train_on_worker({"config": config, "tokens": None, "run": run})
    assert run.journal.path.exists() == is_noted
    assert not is_noted or [event["kind"] for event in events(config, "failed")] == [type(error).__name__]


def test_cluster_that_is_too_small_is_refused(cluster, settings):
    with pytest.raises(
        ConfigError, match=r"workers: 2, each with 2 CPUs .*, and the cluster has room for 1; start more nodes"
    ):
        train(settings(**RAY, execution__workers=2, execution__threads_per_worker=2))


def test_gpus_that_are_not_there_are_refused(cluster, settings):
    with pytest.raises(ConfigError, match="execution.device: cuda, but the cluster has no GPU"):
        train(settings(**RAY, execution__device="cuda"))
