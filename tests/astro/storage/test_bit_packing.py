"""Packing: exact words, round trips at every width, and compressed-tensors' own packer."""

import doctest

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch.utils._python_dispatch import TorchDispatchMode

from astro.errors import CheckpointError
from astro.storage import bit_packing
from astro.storage.bit_packing import pack, unpack

pytestmark = pytest.mark.usefixtures("device")


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


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_single_row_that_lies_as_a_column_is_packed(bits):
    Q = integers(64, 1, bits).T
    assert torch.equal(pack(Q, bits), pack(Q.clone(memory_format=torch.contiguous_format).reshape(1, 64), bits))
    assert torch.equal(unpack(pack(Q.T, bits).T.T, bits, 1), Q.T)


def test_wrong_number_of_words_is_an_error():
    with pytest.raises(CheckpointError, match="expected 8 words a row for 64 columns of 4 bits, got 7"):
        unpack(torch.zeros(2, 7, dtype=torch.int32), 4, 64)


class Operators(TorchDispatchMode):
    """Takes note of the operators that are called, and of the dtypes of what they return."""

    def __init__(self):
        super().__init__()
        self.names, self.dtypes = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        self.dtypes |= {result.dtype} if isinstance(result, torch.Tensor) else set()
        return result


def steps_on_another_device(rows, bits, columns):
    with Operators() as operators:
        words = pack(torch.empty(rows, columns, dtype=torch.int8, device="meta"), bits)
        Q = unpack(words, bits, columns)
    assert (words.device.type, Q.device.type, Q.shape) == ("meta", "meta", (rows, columns))
    return operators


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_device_needs_few_steps_on_integers_that_gpus_compute_with(bits):
    steps, more = (steps_on_another_device(rows, bits, 33) for rows in (4, 1 << 20))
    assert steps.dtypes <= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    assert steps.names == more.names
    assert len(steps.names) < 80


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_in_several_parts_are_packed_as_one(bits):
    rows = 2 * bit_packing._NEAR_ELEMENTS // 1000 + 1
    Q = integers(rows, 1000, bits)
    words = pack(Q, bits)
    assert torch.equal(words[-1:], pack(Q[-1:], bits))
    assert torch.equal(unpack(words, bits, 1000), Q)


def test_worked_numbers_are_true():
    assert doctest.testmod(bit_packing).failed == 0
