import pytest
import torch
from safetensors.torch import load_file

from astro.errors import CheckpointError
from astro.storage.atomic import save_tensors
from astro.storage.joined_tensors import join_tensors


def test_joined_files_hold_the_tensors_of_all_parts(tmp_path):
    parts = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "empty.safetensors"]
    first = {"x": torch.arange(3, dtype=torch.int8), "y": torch.rand(2, 5), "none": torch.zeros(0, 4)}
    second = {"z": torch.rand(7).to(torch.bfloat16), "scalar": torch.tensor(2.0, dtype=torch.float16)}
    for path, tensors in zip(parts, (first, second, {}), strict=True):
        save_tensors(path, tensors)
    joined = tmp_path / "deep" / "all.safetensors"
    entries = join_tensors(joined, parts)
    read = load_file(joined)
    assert read.keys() == first.keys() | second.keys() == {entry.name for entry in entries}
    assert all(torch.equal(read[name], tensor) for name, tensor in (first | second).items())
    assert all(read[name].dtype == tensor.dtype for name, tensor in (first | second).items())


def test_a_tensor_that_two_parts_hold_is_refused(tmp_path):
    parts = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in parts:
        save_tensors(path, {"x": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="b.safetensors: tensor x is in another"):
        join_tensors(tmp_path / "all.safetensors", parts)
    assert not (tmp_path / "all.safetensors").exists()


def test_a_part_that_was_cut_short_is_refused(tmp_path):
    part = tmp_path / "a.safetensors"
    save_tensors(part, {"x": torch.zeros(20)})
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="cut short"):
        join_tensors(tmp_path / "all.safetensors", [part])
