"""Checkpoints that cannot be written or read are named, with whether it helps to try again."""

import errno
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from astro.errors import DamagedError, StorageError
from astro_dist.training import checkpoint
from astro_dist.training.checkpoint import lasts, load_checkpoint, save_checkpoint


@pytest.fixture
def trained():
    model = torch.nn.Linear(2, 2)
    return model, torch.optim.AdamW(model.parameters())


@pytest.mark.parametrize(("number", "is_lasting"), [(errno.ENOSPC, True), (errno.EIO, False)])
def test_folder_that_cannot_be_written_is_named(tmp_path, trained, monkeypatch, number, is_lasting):
    def fail(*_):
        raise OSError(number, "it failed")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(StorageError, match="here: the checkpoint cannot be written: .*it failed") as caught:
        save_checkpoint(tmp_path / "here", *trained, {"step": 1})
    assert lasts(caught.value) == is_lasting


@pytest.mark.parametrize("free", [0, 1 << 30])
def test_full_disk_is_seen_where_torch_says_something_else(tmp_path, trained, monkeypatch, free):
    def fail(*_, **__):
        raise CheckpointException("failed", {0: (RuntimeError("unexpected pos 64 vs 0"), None)})

    monkeypatch.setattr(checkpoint, "save", fail)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: mock.Mock(free=free))
    words = "unexpected pos" if free else "No space left on device"
    with pytest.raises(StorageError, match=f"here: the checkpoint cannot be written: .*{words}") as caught:
        save_checkpoint(tmp_path / "here", *trained, None)
    assert lasts(caught.value) == (not free)


def test_failure_inside_of_torch_is_named_too(tmp_path, trained):
    (tmp_path / "here").write_text("a file in the place of the folder")
    with pytest.raises(StorageError, match="here: the checkpoint cannot be written: "):
        save_checkpoint(tmp_path / "here", *trained, None)


@pytest.mark.parametrize("file", ["clips.pt", "__0_0.distcp", ".metadata"])
def test_checkpoint_that_lacks_a_file_is_damaged(tmp_path, trained, file):
    save_checkpoint(tmp_path, *trained, {"step": 1})
    assert load_checkpoint(tmp_path, *trained) == {"step": 1}
    (tmp_path / file).unlink()
    with pytest.raises(DamagedError, match=f"{tmp_path}: this checkpoint cannot be read: "):
        load_checkpoint(tmp_path, *trained)


def test_checkpoint_that_is_cut_short_is_damaged(tmp_path, trained):
    save_checkpoint(tmp_path, *trained, {"step": 1})
    content = (tmp_path / "clips.pt").read_bytes()
    for length in (0, len(content) // 2):
        (tmp_path / "clips.pt").write_bytes(content[:length])
        with pytest.raises(DamagedError, match="this checkpoint cannot be read: "):
            load_checkpoint(tmp_path, *trained)
