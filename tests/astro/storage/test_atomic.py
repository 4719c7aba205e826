"""Files are written whole or not at all, and every refusal of the file system is an error of this project."""

import json

import pytest
import torch

from astro.errors import CheckpointError, RunError, StorageError
from astro.storage.atomic import load_tensors, read_json, save_tensors, sha256_of, write_json, write_text


def test_written_bytes_do_not_depend_on_the_order_of_tensors(tmp_path):
    a, b = torch.arange(3.0), torch.arange(4, dtype=torch.int32)
    save_tensors(tmp_path / "1", {"a": a, "b": b}, "kept")
    save_tensors(tmp_path / "2", {"b": b, "a": a}, "kept")
    assert sha256_of(tmp_path / "1") == sha256_of(tmp_path / "2")
    tensors, note = load_tensors(tmp_path / "1")
    assert torch.equal(tensors["b"], b)
    assert note == "kept"


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"old": 1})
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match="the disk is full: free space and run the same command again"):
        write_json(tmp_path / "x.json", {"new": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == {"old": 1}


def test_shards_can_be_read_by_whom_other_files_can(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    (tmp_path / "other").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_writing_below_a_regular_file_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file/x: cannot be written: .*check the folder"):
        write_text(tmp_path / "file" / "x", "text")


def test_failed_cleanup_does_not_hide_the_refusal(tmp_path, monkeypatch):
    def refuse(self, missing_ok=False):
        raise PermissionError("cleanup")

    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    with pytest.raises(StorageError, match="the disk is full"):
        write_text(tmp_path / "x", "text")


def test_missing_json_says_who_needs_it(tmp_path):
    with pytest.raises(CheckpointError, match="x.json: not found$"):
        read_json(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match="x.json: not found; a run must hold it$"):
        read_json(tmp_path / "x.json", if_missing="a run must hold it")
