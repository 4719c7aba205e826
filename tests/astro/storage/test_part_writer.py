"""Files that are written behind the work are what `save_part` writes, and whole when `finish` returns."""

import threading

import pytest
import torch

from astro.errors import StorageError
from astro.storage import part_writer
from astro.storage.checked_tensors import load_part, save_part
from astro.storage.device_copies import DeviceCopies
from astro.storage.part_writer import PartWriter
from tests.support.devices import here


def writer():
    return PartWriter(DeviceCopies(torch.device("cpu")))


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that writes nothing until it is told to."""
    may_write = threading.Event()

    def save(path, tensors, note=""):
        assert may_write.wait(30)
        save_part(path, tensors, note)

    monkeypatch.setattr(part_writer, "save_part", save)
    return may_write


def test_bytes_are_those_of_save_part(tmp_path):
    tensors, behind = {"x": torch.arange(5000.0), "y": torch.ones(3, dtype=torch.bfloat16)}, writer()
    behind.begin(tmp_path / "a", tensors, "a note")
    behind.finish()
    save_part(tmp_path / "b", tensors, "a note")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.usefixtures("device")
def test_files_hold_what_the_device_computed_while_it_goes_on(tmp_path):
    behind, X = PartWriter(DeviceCopies(here())), torch.arange(1 << 18).float()
    for number in range(4):
        behind.begin(tmp_path / f"{number}", {"x": X * number, "y": X.gt(number).to(torch.int8)})
        torch.full_like(X, -1.0)  # in the memory of what is to be written, if that were free
    behind.finish()
    for number in range(4):
        expected = {"x": X.cpu() * number, "y": X.cpu().gt(number).to(torch.int8)}
        save_part(tmp_path / "expected", expected)
        assert (tmp_path / f"{number}").read_bytes() == (tmp_path / "expected").read_bytes()


def test_finish_waits_until_the_file_is_whole(tmp_path, slow_disk):
    behind = writer()
    behind.begin(tmp_path / "a", {"x": torch.ones(3)})
    assert not behind.last.done()
    assert not (tmp_path / "a").exists()
    threading.Timer(0.05, slow_disk.set).start()
    behind.finish()
    assert torch.equal(load_part(tmp_path / "a")[0]["x"], torch.ones(3))
    assert behind.last is None


def test_nothing_is_written_any_more_once_it_was_given_up(tmp_path, slow_disk):
    behind = writer()
    (tmp_path / "file").write_text("")
    behind.begin(tmp_path / "file" / "a", {"x": torch.ones(3)})
    behind.begin(tmp_path / "b", {"x": torch.ones(3)})
    threading.Timer(0.05, slow_disk.set).start()
    behind.give_up()  # without an error: that of who began it counts
    assert (tmp_path / "b").exists()
    assert behind.last is None


def test_memory_is_bounded(tmp_path, slow_disk):
    behind = writer()
    for name in "ab":
        behind.begin(tmp_path / name, {"x": torch.ones(3)})
    threading.Timer(0.05, slow_disk.set).start()
    behind.begin(tmp_path / "c", {"x": torch.ones(3)})
    assert (tmp_path / "a").exists(), "the third file begins only once the first is whole"
    behind.finish()


def test_error_of_the_writer_surfaces_and_the_others_are_written(tmp_path):
    (tmp_path / "file").write_text("")
    behind = writer()
    behind.begin(tmp_path / "file" / "a", {"x": torch.ones(3)})
    behind.begin(tmp_path / "b", {"x": torch.ones(3)})
    with pytest.raises(StorageError, match="cannot be written"):
        behind.finish()
    assert (tmp_path / "b").exists()
    behind.finish()  # the error was told
