"""Rows are cut by the model and the kind of device alone."""

import pytest
import torch

from astro.linalg.tiling import TILE_ELEMENTS, cut, near_rows, row_tiles


@pytest.mark.parametrize(
    ("columns", "device", "rows"),
    [(8192, "cuda", 16384), (28672, "cuda", 4681), (10**6, "cuda", 1024), (576, "cpu", 1820), (8192, "cpu", 1024)],
)
def test_tiles_are_as_even_as_can_be_and_no_larger_than_the_device_takes(columns, device, rows):
    tiles = row_tiles(3 * rows + 5, columns, TILE_ELEMENTS[device])
    assert len(tiles) == 4
    assert [tile.start for tile in tiles] == [0, *(tile.stop for tile in tiles[:-1])]
    assert {tile.stop - tile.start for tile in tiles} <= {(3 * rows + 5) // 4, (3 * rows + 5) // 4 + 1}


def test_copies_of_a_row_count_as_rows():
    assert row_tiles(300, 4096, 1 << 20, copies=6) == [slice(0, 150), slice(150, 300)]
    assert row_tiles(2, 4096, 1 << 20, copies=2000) == [slice(0, 1), slice(1, 2)]


def test_near_rows_are_all_rows_in_parts_that_stay_near():
    assert near_rows(torch.empty(2, 100, 64)) == [slice(0, 100)]
    assert near_rows(torch.empty(2, 1024, 256)) == [slice(0, 512), slice(512, 1024)]


def test_nothing_is_cut_into_nothing():
    assert cut(0, 3) == []
