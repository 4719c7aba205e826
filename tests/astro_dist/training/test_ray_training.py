"""Trainings on a real Ray cluster: two workers do what one does, and go on when one of them is killed."""

import os
import signal
import threading
import time

import pytest
import ray
import torch
from safetensors import safe_open

from astro.errors import ConfigError, NumericalError, StorageError
from astro.model.clips_file import CLIPS_FILE
from astro_dist.training.progress import in_line
from astro_dist.training.train import train

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]  # Ray Train starts workers for half a minute
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


@pytest.mark.parametrize("changes", [{"regularization__layers": ["*.nothing"]}, {}], ids=["input", "storage"])
def test_error_of_a_worker_ends_all_at_once_and_is_not_tried_again(cluster, settings, changes):
    config = settings(**RAY, execution__workers=2, execution__max_retries=0 if not changes else 3, **changes)
    if not changes:
        config.output.dir.mkdir()
        (config.output.dir / "progress.jsonl").mkdir()  # worker 0 alone writes there, and the other waits for it
    begin = time.monotonic()
    with pytest.raises(ConfigError if changes else StorageError, match=r"matches no linear layer|progress\.jsonl"):
        train(config)
    assert time.monotonic() - begin < 60, "a worker waited for one that had ended"


def test_gpus_that_are_not_there_are_refused(cluster, settings):
    with pytest.raises(ConfigError, match="execution.device: cuda, but the cluster has no GPU"):
        train(settings(**RAY, execution__device="cuda"))
