"""Workers share a text, and their number changes no bit of what they find."""

import os
import signal

import pytest
import ray
import torch

from astro.errors import NumericalError, RunError
from astro_dist.evaluation.judge_settings import JudgeSettings
from astro_dist.evaluation.measuring_worker import BeginShare, MeasuringSpec, MeasuringWorker, SharedModel
from astro_dist.evaluation.streamed_model import StreamedModel
from astro_dist.evaluation.text_loss import measure_text
from astro_dist.evaluation.text_share import Measured
from astro_dist.evaluation.text_windows import TextWindows
from astro_dist.execution.executor import Failed, Returned
from astro_dist.execution.measuring_pool import MeasuringPool, _Shares, cut_shares
from astro_dist.export.named_model import find_model
from astro_dist.source.long_wait import LongWait

SETTINGS = JudgeSettings(dtype="float32")


@pytest.fixture(scope="module")
def cluster():
    """A private cluster of two CPUs on this machine."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
    yield
    ray.shutdown()


def windows(count=7):
    return TextWindows("random", torch.randint(0, 250, (count, 24), generator=torch.Generator().manual_seed(3)), 0)


def measured(folder, workers, against=None, settings=SETTINGS):
    text = windows()
    with MeasuringPool(workers, "cpu") as pool:
        settings = pool.settle(settings)
        model, other = (StreamedModel(find_model(str(name)), settings) if name else None for name in (folder, against))
        return measure_text(model, text, 48, other, pool.measure)


@pytest.mark.ray
def test_any_number_of_workers_finds_the_same(cluster, llama, finished):
    torch.set_num_threads(1)
    here = JudgeSettings(device="cpu", dtype="float32")
    expected = measure_text(
        StreamedModel(find_model(str(finished)), here), windows(), 48, StreamedModel(find_model(str(llama)), here)
    )
    for workers in (1, 2):
        found = measured(finished, workers, llama)
        assert (found.perplexity, found.error, found.compared) == (
            expected.perplexity, expected.error, expected.compared,
        )  # fmt: skip
        assert (found.windows, found.num_readings) == (7, workers)
        assert found.peak_rss_bytes > 0


@pytest.mark.ray
def test_share_of_a_worker_that_dies_is_measured_by_another(cluster, llama, tmp_path, monkeypatch):
    once, real = tmp_path / "killed", MeasuringWorker.do

    def killed_once(self, call):
        if not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, call)

    expected = measure_text(
        StreamedModel(find_model(str(llama)), JudgeSettings(device="cpu", dtype="float32")), windows(), 48, None
    )
    monkeypatch.setattr(MeasuringWorker, "do", killed_once)
    assert measured(llama, 2).perplexity == expected.perplexity
    assert once.exists()


class Executor:
    """An executor to which events happen, and which has a free worker at the beginning and after some of them."""

    def __init__(self, *events, free=0):
        self.events, self.free = list(events), [free]

    def idle(self):
        return [worker for worker in self.free if worker is not None]

    def submit(self, worker, call):
        self.free.remove(worker)

    def wait(self, timeout_s):
        event = self.events.pop(0)
        if isinstance(event, Returned) or event.lost:
            self.free = [event.worker + isinstance(event, Failed)]
        return event


def shares(executor):
    return _Shares(executor, [BeginShare((), 0)], LongWait("", 1.0, ""))


@pytest.mark.parametrize(
    ("events", "kind", "message"),
    [
        ([Failed(0, NumericalError("no number"), lost=False)], NumericalError, "^no number$"),
        ([Failed(0, TypeError("x"), lost=False)], RunError, r"worker 0, share 1 of 1: TypeError: x; nothing of it is"),
        ([Failed(n, RunError("it died"), lost=True) for n in range(4)], RunError, "worker 3, share 1 of 1: .*it died"),
    ],
)
def test_errors_that_cannot_be_helped_are_told(events, kind, message):
    with pytest.raises(kind, match=message):
        shares(Executor(*events)).measure()


def test_worker_that_cannot_start_is_no_matter_while_others_work():
    done = Measured((), (), 1)
    assert shares(Executor(Failed(7, OSError("no room"), lost=False), Returned(0, done))).measure() == [done]
    starting = shares(Executor(Failed(0, OSError("no room"), lost=False), free=None))
    with pytest.raises(RunError, match="worker 0, its start: OSError: no room"):
        starting.measure()


def test_worker_that_sees_another_model_is_refused(llama):
    source = find_model(str(llama))
    worker = MeasuringWorker(MeasuringSpec(SharedModel(source, "other"), None, SETTINGS, 1))
    with pytest.raises(RunError, match="is not the model that the command sees under this path"):
        worker.prepare()


@pytest.mark.parametrize(
    ("batches", "workers", "waves", "sizes"),
    [(7, 2, 1, [3, 4]), (7, 2, 3, [1, 2, 2, 2]), (2, 8, 1, [1, 1]), (8, 1, 2, [4, 4])],
)
def test_shares_are_alike_and_fit_into_memory(batches, workers, waves, sizes):
    shares = cut_shares(range(batches), workers, waves)
    assert [len(share) for share in shares] == sizes
    assert [batch for share in shares for batch in share] == list(range(batches))
