"""Packing: exact words, round trips at every width, and compressed-tensors' own packer."""

import doctest

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from astro.errors import CheckpointError
from astro.storage import bit_packing
from astro.storage.bit_packing import pack, unpack


def integers(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 576])
def test_round_trip(bits, columns):
    Q = integers(3, columns, bits)
    assert torch.equal(unpack(pack(Q, bits), bits, columns), Q)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 8, 33, 64, 96, 576])
def test_against_compressed_tensors_own_packer(bits, columns):
    Q = integers(5, columns, bits)
    words = pack_to_int32(Q, bits)
    assert torch.equal(pack(Q, bits), words)
    assert torch.equal(unpack(words, bits, columns), Q)


def test_four_bits_are_nibbles_least_significant_first():
    Q = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, 7]], dtype=torch.int8)
    assert pack(Q, 4).tolist() == [[0xF6543210 - (1 << 32)]]


def test_three_bits_cross_word_borders():
    Q = torch.full((1, 32), 3, dtype=torch.int8)
    assert pack(Q, 3).tolist() == [[-1, -1, -1]]


def test_wrong_number_of_words_is_an_error():
    with pytest.raises(CheckpointError, match="expected 8 words a row for 64 columns of 4 bits, got 7"):
        unpack(torch.zeros(2, 7, dtype=torch.int32), 4, 64)


def test_worked_numbers_are_true():
    assert doctest.testmod(bit_packing).failed == 0
