"""Chunks are read, computed and written at the same time; a call returns when its own file is whole."""

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from astro.calibration.block_statistics import BlockStatistics
from astro.errors import StorageError
from astro.storage import part_writer
from astro.storage.checked_tensors import save_part
from astro.timing import Stopwatch
from astro_dist import pipeline
from astro_dist.schedule.calls import Backward, DifferentiateLoss, Forward, ForwardChunk
from astro_dist.worker import chunk_pipeline, prefetch, token_weigher
from astro_dist.worker.worker import Worker
from tests.support.models import files_of

LOSS = {"calibration__token_weights": "loss", "calibration__chunk_samples": 1}


def ahead_of(monkeypatch, kind=None):
    """Notes, for every call of a kind, whether its output had been computed in the call before."""
    hits, real = [], chunk_pipeline.ChunkPipeline.run

    def run(self, passage, chunk, in_order=False):
        if kind in (None, passage.place[0]):
            ahead = self._ahead
            hits.append(ahead is not None and (ahead.place, ahead.chunk) == (passage.place, chunk))
        real(self, passage, chunk, in_order)

    monkeypatch.setattr(chunk_pipeline.ChunkPipeline, "run", run)
    return hits


@pytest.fixture
def slow_writer(monkeypatch):
    """A disk on which a file is not whole before its caller has had time to compute the next one."""

    def save(path, tensors, note=""):
        time.sleep(0.05)
        save_part(path, tensors, note)

    monkeypatch.setattr(part_writer, "save_part", save)


def no_overlap(monkeypatch):
    """Lets a worker read, compute and write one after the other."""
    monkeypatch.setattr(chunk_pipeline.ChunkPipeline, "_go_on", lambda self, passage, chunk: None)
    monkeypatch.setattr(prefetch.Prefetch, "expect", lambda self, *paths: None)


@pytest.mark.parametrize("mode", ["blocks", "sequential"])
def test_bytes_are_those_of_one_step_after_the_other(run_config, tmp_path, monkeypatch, slow_writer, mode):
    hits = ahead_of(monkeypatch)
    pipeline.quantize(run_config(execution__mode=mode, **LOSS))
    assert sum(hits) > len(hits) / 4
    no_overlap(monkeypatch)
    hits.clear()
    pipeline.quantize(run_config(execution__mode=mode, output__dir=str(tmp_path / "plain"), **LOSS))
    assert not any(hits)
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "plain" / "model")


@pytest.mark.parametrize("kind", [Forward, ForwardChunk, DifferentiateLoss, Backward])
def test_which_chunks_are_computed_ahead(run_config, monkeypatch, slow_writer, kind):
    hits = ahead_of(monkeypatch, kind)
    weights = "norm" if kind is Forward else "loss"  # behind the waves of the loss the outputs are there already
    pipeline.quantize(run_config(**LOSS | {"calibration__token_weights": weights, "calibration__holdout_samples": 0}))
    if kind is Forward:  # the last block's output is not written, so nothing is waited for
        assert hits == [False, *[True] * 5] * 2 + [False] * 6
    else:  # the second chunk is the first that is seen to follow another
        assert hits == [False, False, *[True] * 4] * (1 if kind is DifferentiateLoss else 3)


def test_time_of_a_gradient_that_is_passed_back_ahead_is_read_by_its_own_call(run_config, monkeypatch, slow_writer):
    """Reading it waits for the device, and the call before is not to wait for that."""
    happened, do = [], Worker.do

    class Watch(Stopwatch):
        def __init__(self, device):
            super().__init__(device)
            happened.append(self)

        def read_s(self):
            happened.append((self, "read"))
            return super().read_s()

    def call(self, call):
        if isinstance(call, Backward):
            happened.append(call.chunk)
        return do(self, call)

    monkeypatch.setattr(token_weigher, "Stopwatch", Watch)
    monkeypatch.setattr(Worker, "do", call)
    pipeline.quantize(run_config(**LOSS))
    watches = {each: f"watch {number % 6}" for number, each in enumerate(e for e in happened if isinstance(e, Watch))}
    told = [
        watches[each] if isinstance(each, Watch) else f"{watches[each[0]]} read" if isinstance(each, tuple) else each
        for each in happened
    ]
    of_block = told[: len(told) // 3]
    assert of_block[of_block.index("c0002") :] == [
        "c0002", "watch 2 read", "watch 3", "c0003", "watch 3 read", "watch 4", "c0004", "watch 4 read", "watch 5",
        "c0005", "watch 5 read",
    ]  # fmt: skip


class States:
    """Hidden states whose files are read at once, and whole only when somebody waits for them."""

    def __init__(self):
        self.writing, self.finish_writing = Future(), lambda: None

    def read_several(self, *places):
        return places

    def expect(self, *places):
        reading = Future()
        reading.set_result(None)
        return reading


@pytest.mark.parametrize(
    ("asked", "computed"),
    [
        ("0123", "01234"),
        ("0235", "02345"),  # 4 was computed in vain
        ("0246", "0246"),  # other workers have the chunks between
        ("1032", "1032"),
        ("01a23", "012234"),  # another place: what was computed ahead is dropped
    ],
)
def test_nothing_is_computed_ahead_where_others_share_the_chunks(asked, computed):
    order = []

    def compute(chunk, states):
        order.append(chunk)
        return chunk.upper()

    def save(chunk, output):
        assert output == chunk.upper()

    ahead = chunk_pipeline.ChunkPipeline(States(), "0123456")
    for chunk in asked:
        place = "elsewhere" if chunk == "a" else "here"
        ahead.run(chunk_pipeline.Passage(place, lambda chunk: [chunk], compute, save), chunk)
    assert "".join(order).replace("a", "") == computed


@pytest.mark.parametrize("kind", [Forward, ForwardChunk, DifferentiateLoss, Backward])
def test_call_returns_when_its_own_file_is_whole(run_config, monkeypatch, slow_writer, kind):
    real, checked = Worker.do, []

    def do(self, call):
        result = real(self, call)
        run = self._runner.spec.run
        if type(call) is kind and not (kind is Forward and call.block == 2):
            before, after = getattr(call, "block", 3), getattr(call, "block", 3) + 1
            stream, block = ("gradient", before) if kind in (Backward, DifferentiateLoss) else ("original", after)
            checked.append(not block or run.hidden(stream, block, call.chunk).is_file())
        return result

    monkeypatch.setattr(Worker, "do", do)
    pipeline.quantize(run_config(**LOSS, calibration__holdout_samples=0))
    assert len(checked) == 6 * (1 if kind is DifferentiateLoss else 2 if kind is Forward else 3)
    assert all(checked)


def test_error_of_the_writer_is_one_of_the_call(run_config, monkeypatch):
    failures, real = [], part_writer.save_part

    def save(path, tensors, note=""):
        if "c0001" in path.name and path.parent.name == "0001" and not failures:
            failures.append(path)
            raise StorageError(f"{path}: cannot be written: the disk is full")
        real(path, tensors, note)

    monkeypatch.setattr(part_writer, "save_part", save)
    monkeypatch.setattr("astro_dist.execution.failure._STORAGE_WAIT_S", 0.01)
    config = run_config()
    pipeline.quantize(config)
    (failed,) = [line for line in (config.output.dir / "journal.jsonl").read_text().splitlines() if '"failed"' in line]
    assert '"kind": "storage"' in failed
    assert '"unit": "round-0-block-0000"' in failed
    assert '"method": "forward"' in failed


def test_call_that_fails_waits_until_nothing_is_written_any_more():
    """The worker in its place may be in this very process, and make the same files."""
    seen, worker = [], Worker(SimpleNamespace(device="cpu"))
    worker._pipeline = SimpleNamespace(forget=lambda: None)
    states = SimpleNamespace(
        finish_writing=lambda: seen.append("finished"), give_up_writing=lambda: seen.append("given up")
    )
    worker._runner = SimpleNamespace(states=states)
    worker._do = lambda call: None if call.block else 1 / 0
    worker.do(ForwardChunk("original", 1, "c0000", "unit"))
    with pytest.raises(ZeroDivisionError):
        worker.do(ForwardChunk("original", 0, "c0000", "unit"))
    assert seen == ["finished", "given up"]


def test_file_is_written_while_the_next_chunk_is_computed(run_config, monkeypatch):
    """No file is whole before the next chunk has been computed, so that a run that does not overlap would stand still.

    `tests/bench/overlap.py` measures what that gains.
    """
    computed, real = {f"c{number:04d}": threading.Event() for number in range(6)}, BlockStatistics.run

    def run(self, action, chunk):
        output = real(self, action, chunk)
        computed[chunk].set()
        return output

    def save(path, tensors, note=""):
        following = computed.get(f"c{int(path.stem[1:]) + 1:04d}") if path.parent.name == "0001" else None
        assert following is None or following.wait(30)
        save_part(path, tensors, note)

    monkeypatch.setattr(BlockStatistics, "run", run)
    monkeypatch.setattr(part_writer, "save_part", save)
    pipeline.quantize(run_config(calibration__chunk_samples=1, calibration__holdout_samples=0))
