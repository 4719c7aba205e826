"""The file of learned clips: what is written is read, and what is no such file is refused."""

import pytest
import torch
from safetensors.torch import save_file

from astro.errors import CheckpointError
from astro.model.clips_file import CLIPS_FILE, read_clips, write_clips
from astro.storage.byte_store import FolderStore

CLIPS = {"model.layers.0.q_proj": torch.tensor([-1.0, 2.0]), "model.layers.0.o_proj": torch.tensor([-0.5, 0.25])}


def test_clips_are_read_as_they_were_written(tmp_path):
    write_clips(tmp_path / CLIPS_FILE, CLIPS, 4)
    stored = read_clips(FolderStore(tmp_path), CLIPS_FILE)
    assert stored.bits == 4
    assert {name: clips.tolist() for name, clips in stored.by_layer.items()} == {
        n: c.tolist() for n, c in CLIPS.items()
    }


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"q.input_clips": torch.zeros(2)}, {"format": "pt"}, "metadata should tell the `bits`.* got ''"),
        ({"q.input_clips": torch.zeros(2)}, {"bits": "None"}, "metadata should tell the `bits`.* got 'None'"),
        ({"q.input_clips": torch.zeros(3)}, {"bits": "4"}, r"expected tensors NAME.input_clips of \[2\], got q"),
        ({"q.weight": torch.zeros(2)}, {"bits": "4"}, r"expected tensors NAME.input_clips of \[2\], got q.weight"),
    ],
)
def test_other_files_are_refused(tmp_path, tensors, metadata, message):
    save_file(tensors, tmp_path / CLIPS_FILE, metadata)
    with pytest.raises(CheckpointError, match=message):
        read_clips(FolderStore(tmp_path), CLIPS_FILE)


def test_missing_and_short_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=f"{CLIPS_FILE}: is not there; `astro-dist train` writes it"):
        read_clips(FolderStore(tmp_path), CLIPS_FILE)
    write_clips(tmp_path / CLIPS_FILE, CLIPS, 4)
    content = (tmp_path / CLIPS_FILE).read_bytes()
    (tmp_path / CLIPS_FILE).write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match="the shard is cut short"):
        read_clips(FolderStore(tmp_path), CLIPS_FILE)
