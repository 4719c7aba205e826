"""Checkpoints: what is wrong is found in the headers."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from astro.errors import CheckpointError, UnsupportedError
from astro.storage.checkpoint import INDEX_NAME, Checkpoint, require_finite


@pytest.fixture
def folder(tmp_path):
    """Two shards, four tensors, an index."""
    tensors = {name: torch.arange(12.0).reshape(3, 4) + i for i, name in enumerate("abcd")}
    save_file({n: tensors[n] for n in "ab"}, tmp_path / "one.safetensors")
    save_file({n: tensors[n] for n in "cd"}, tmp_path / "two.safetensors")
    weight_map = {n: "one.safetensors" if n in "ab" else "two.safetensors" for n in "abcd"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def change_index(folder, **changes):
    path = folder / INDEX_NAME
    content = json.loads(path.read_text())
    content["weight_map"].update(changes)
    path.write_text(json.dumps(content))


def test_open_lists_every_tensor(folder):
    checkpoint = Checkpoint.open(folder)
    assert list(checkpoint.entries) == list("abcd")
    assert checkpoint.entries["c"].shape == (3, 4)
    assert checkpoint.size_bytes("ab") == 96
    assert torch.equal(checkpoint.read(["d"])["d"], torch.arange(12.0).reshape(3, 4) + 3)


def test_single_file_needs_no_index(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(Checkpoint.open(tmp_path).entries) == ["x"]


def test_missing_shard(folder):
    (folder / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match="two.safetensors: the index names this shard, but it is missing"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_truncated_shard(folder, keep):
    path = folder / "one.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="one.safetensors: .*cut short"):
        Checkpoint.open(folder)


def test_shard_with_bytes_behind_its_end(folder):
    with (folder / "one.safetensors").open("ab") as handle:
        handle.write(b"xx")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[1]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"a": {}}',
        b'{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},'
        b' "b": {"dtype": "U8", "shape": [1], "data_offsets": [7, 8]}}',
        b'{"a": {"dtype": "F8_X", "shape": [8], "data_offsets": [0, 8]}}',
    ],
)
def test_damaged_header(folder, header):
    (folder / "one.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match="one.safetensors: its safetensors header is damaged"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["float8_e8m0fnu", "float8_e5m2", "float8_e4m3fnuz", "complex64"])
def test_every_dtype_of_safetensors_that_torch_has_is_read(tmp_path, name):
    tensor = torch.ones(2, 2).to(getattr(torch, name))
    save_file({"s": tensor}, tmp_path / "model.safetensors")
    read = Checkpoint.open(tmp_path).read(["s"])["s"]
    assert read.dtype == tensor.dtype
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_dtype_whose_values_share_bytes_is_no_damage(folder):
    header = b'{"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}'
    (folder / "one.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UnsupportedError, match="one.safetensors: tensor a has dtype F4, which cannot be read"):
        Checkpoint.open(folder)


def test_index_naming_a_tensor_that_is_not_there(folder):
    change_index(folder, ghost="one.safetensors")
    with pytest.raises(CheckpointError, match=r"do not hold \(1\), the first is 'ghost' in one.safetensors"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", 3, "x.bin"])
def test_index_path_that_leaves_the_folder(folder, file):
    change_index(folder, a=file)
    with pytest.raises(CheckpointError, match="tensor 'a' is said to be in .*never followed"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "{" * 2000])
def test_index_that_is_no_index(folder, text):
    (folder / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        Checkpoint.open(folder)


def test_pickle_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pytorch_model.bin but no safetensors; such a file is a pickle"):
        Checkpoint.open(tmp_path)


def test_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for source in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(CheckpointError, match="GGUF file holds weights that are quantized already"):
            Checkpoint.open(source)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="cannot be read: .*name too long"):
        Checkpoint.open(tmp_path / ("x" * 300))
    with pytest.raises(CheckpointError, match="holds neither"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_named(tmp_path, value, dtype):
    W = torch.ones(5, 3, dtype=dtype)
    W[4, 2] = value
    save_file({"fine": torch.ones(2), "layer.weight": W}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensor layer.weight holds NaN or Inf"):
        require_finite(Checkpoint.open(tmp_path))


def test_unused_tensors_may_hold_inf_and_are_named(tmp_path):
    mask = torch.full((4, 4), float("-inf")).triu(1)
    save_file({"layer.mask": mask, "layer.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert require_finite(Checkpoint.open(tmp_path), unused=["layer.mask", "layer.weight"]) == ["layer.mask"]
    with pytest.raises(CheckpointError, match="tensor layer.mask holds NaN or Inf"):
        require_finite(Checkpoint.open(tmp_path), unused=["layer.weight"])


def test_a_single_file_goes_before_an_index_beside_it(folder):
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    assert list(Checkpoint.open(folder).entries) == ["x"]


def test_finite_weights_of_any_shape_pass(tmp_path):
    save_file({"s": torch.tensor(1.0), "e": torch.ones(0, 3), "i": torch.ones(2).int()}, tmp_path / "model.safetensors")
    require_finite(Checkpoint.open(tmp_path))


def test_fingerprint_tells_weights_apart(folder):
    before = Checkpoint.open(folder).fingerprint()
    assert Checkpoint.open(folder).fingerprint() == before
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(3, 4)}, folder / "one.safetensors")
    assert Checkpoint.open(folder).fingerprint() != before


def test_fingerprint_covers_the_models_config(folder):
    before = Checkpoint.open(folder).fingerprint()
    (folder / "config.json").write_text("{}")
    assert Checkpoint.open(folder).fingerprint() != before


def test_shard_that_is_cut_short_while_it_is_read_is_an_error(folder):
    checkpoint = Checkpoint.open(folder)
    path = folder / "one.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="one.safetensors: ends too early; it was cut short"):
        checkpoint.read("ab")
