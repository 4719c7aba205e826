"""Parts of a run carry a checksum over everything that is in them."""

import json

import pytest
import torch

from astro.errors import DamagedError
from astro.storage.checked_tensors import load_part, read_part_note, save_part

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([True, False]), "c": torch.tensor(7)}


def test_round_trip(tmp_path):
    save_part(tmp_path / "part", TENSORS, "first\nsecond")
    tensors, note = load_part(tmp_path / "part")
    assert note == read_part_note(tmp_path / "part") == "first\nsecond"
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_every_byte_that_is_changed_is_found(tmp_path):
    save_part(tmp_path / "part", TENSORS, json.dumps({"num_tokens": 123}))
    whole = (tmp_path / "part").read_bytes()
    for position in range(8, len(whole)):
        if whole[position : position + 1] == b" ":
            continue  # padding of the header
        changed = bytearray(whole)
        changed[position] ^= 1
        (tmp_path / "part").write_bytes(changed)
        with pytest.raises(DamagedError, match=r"part: "):
            load_part(tmp_path / "part")


def test_changes_within_pages_and_pages_that_changed_places_are_found(tmp_path):
    values = torch.randn(3 * 1024 + 5, generator=torch.Generator().manual_seed(0))
    save_part(tmp_path / "part", {"x": values})
    whole = (tmp_path / "part").read_bytes()
    start = len(whole) - values.nbytes
    for position in range(start, len(whole), 97):
        changed = bytearray(whole)
        changed[position] ^= 0x80
        (tmp_path / "part").write_bytes(changed)
        with pytest.raises(DamagedError, match="its checksum is wrong"):
            load_part(tmp_path / "part")
    first, second = whole[start : start + 4096], whole[start + 4096 : start + 8192]
    for pages in (second + first, first + bytes(4096)):
        (tmp_path / "part").write_bytes(whole[:start] + pages + whole[start + 8192 :])
        with pytest.raises(DamagedError, match="its checksum is wrong"):
            load_part(tmp_path / "part")


def test_part_of_a_larger_tensor(tmp_path):
    large = torch.arange(20_000, dtype=torch.int8)
    save_part(tmp_path / "part", {"x": large[3:9003], "y": large.clone()[8:16_008].view(2, -1)})
    tensors, _ = load_part(tmp_path / "part")
    assert torch.equal(tensors["x"], large[3:9003])
    assert torch.equal(tensors["y"].flatten(), large[8:16_008])


def test_part_that_is_missing_or_cut_short(tmp_path):
    save_part(tmp_path / "part", TENSORS)
    (tmp_path / "part").write_bytes((tmp_path / "part").read_bytes()[:-1])
    with pytest.raises(DamagedError, match="cannot be read"):
        load_part(tmp_path / "part")
    with pytest.raises(DamagedError, match="cannot be read"):
        read_part_note(tmp_path / "gone")
