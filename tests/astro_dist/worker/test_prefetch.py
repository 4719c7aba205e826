"""What is read ahead is what would be read, and a run reads ahead."""

import os

import pytest
import torch

from astro.errors import DamagedError
from astro.storage.checked_tensors import save_part
from astro.storage.device_copies import DeviceCopies
from astro_dist import pipeline
from astro_dist.schedule.names import GRADIENT
from astro_dist.worker.prefetch import Prefetch
from tests.support.devices import here


def prefetch():
    return Prefetch(DeviceCopies(torch.device("cpu")))


def part(path, value):
    save_part(path, {"x": torch.full((3,), value)})
    return path


def test_file_is_read_before_it_is_asked_for(tmp_path):
    ahead, first, second = prefetch(), part(tmp_path / "a", 1.0), part(tmp_path / "b", 2.0)
    ahead.expect(first)
    assert ahead._ahead._next[1].exception() is None  # waits
    first.unlink()
    assert torch.equal(ahead.take(first)[0]["x"], torch.ones(3))
    assert torch.equal(ahead.take(second)[0]["x"], torch.full((3,), 2.0))


@pytest.mark.usefixtures("device")
def test_what_is_read_ahead_is_on_the_device_when_it_is_read(tmp_path):
    ahead, paths = Prefetch(DeviceCopies(here())), [tmp_path / f"{number}" for number in range(4)]
    for number, path in enumerate(paths):
        save_part(path, {"x": torch.full((1 << 18,), float(number), device="cpu")})
    sums = []
    for number, path in enumerate(paths):
        X = ahead.take(path)[0]["x"]
        if number + 1 < len(paths):
            ahead.expect(paths[number + 1])  # which is copied while this one is added up
        sums.append(X.sum())
        assert X.device.type == here().type
    assert [float(x) for x in sums] == [float(number << 18) for number in range(4)]


def test_other_file_than_expected(tmp_path):
    ahead, first, second = prefetch(), part(tmp_path / "a", 1.0), part(tmp_path / "b", 2.0)
    ahead.expect(first)
    assert torch.equal(ahead.take(second)[0]["x"], torch.full((3,), 2.0))
    part(first, 3.0)
    assert torch.equal(ahead.take(first)[0]["x"], torch.full((3,), 3.0)), "what was not taken is not kept"


@pytest.mark.parametrize("mended", [True, False])
def test_file_that_was_damaged_when_it_was_read_ahead(tmp_path, mended):
    ahead, path = prefetch(), part(tmp_path / "a", 1.0)
    path.write_bytes(path.read_bytes()[:-1])
    ahead.expect(path)
    assert isinstance(ahead._ahead._next[1].exception(), DamagedError)
    if mended:
        part(path, 4.0)
        assert torch.equal(ahead.take(path)[0]["x"], torch.full((3,), 4.0))
    else:
        with pytest.raises(DamagedError, match="cannot be read"):
            ahead.take(path)


def test_file_that_is_not_there_yet(tmp_path):
    ahead = prefetch()
    ahead.expect(tmp_path / "folder" / "a")
    ahead.expect(tmp_path / "a")
    part(tmp_path / "a", 5.0)
    assert torch.equal(ahead.take(tmp_path / "a")[0]["x"], torch.full((3,), 5.0))


def test_two_files_that_are_wanted_together(tmp_path):
    ahead, first, second = prefetch(), part(tmp_path / "a", 1.0), part(tmp_path / "b", 2.0)
    ahead.expect(first, tmp_path / "c")
    assert ahead.reading(first, tmp_path / "c") is None, "one of them is not there yet"
    ahead.expect(first, second)
    ahead.reading(first, second).result()
    first.unlink()
    assert [float(tensors["x"][0]) for tensors in ahead.take(first, second)] == [1.0, 2.0]


@pytest.mark.parametrize("mode", ["blocks", "sequential"])
def test_run_reads_ahead(run_config, monkeypatch, mode):
    hits, real = [], Prefetch.take

    def take(self, *paths):
        hits.append(self.reading(*paths) is not None)
        return real(self, *paths)

    monkeypatch.setattr(Prefetch, "take", take)
    pipeline.quantize(run_config(execution__mode=mode))
    assert sum(hits) >= len(hits) / 4, hits


def test_gradients_pass_back_while_the_next_input_is_read(run_config, monkeypatch):
    hits, real = [], Prefetch.take

    def take(self, *paths):
        if len(paths) == 2:
            assert paths[1].parts[-3] == GRADIENT
            hits.append(self.reading(*paths) is not None)
        return real(self, *paths)

    monkeypatch.setattr(Prefetch, "take", take)
    pipeline.quantize(run_config(calibration__token_weights="loss", calibration__chunk_samples=1))
    assert hits == [False, False, True, True, True, True] * 3, "the third chunk is the first that is seen to follow"


def test_reading_has_one_thread_and_leaves_those_at_work_alone(tmp_path):
    before, path = torch.get_num_threads(), part(tmp_path / "a", 1.0)
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 20).sum()
        ahead = prefetch()
        ahead.expect(path)
        ahead.take(path)
        assert ahead._ahead._pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
        tasks = len(os.listdir("/proc/self/task"))
        ahead._ahead._pool.submit(lambda: torch.ones(1 << 22).sum()).result()
        assert len(os.listdir("/proc/self/task")) == tasks
    finally:
        torch.set_num_threads(before)
