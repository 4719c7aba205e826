"""Small integers in int32 words: dense, least significant bits first, as compressed-tensors stores them.

Element i of a row takes bits i·b to i·b + b − 1 of the row's bit string; for 3 bits an element may cross a word border.
"""

import math

import torch

from astro.errors import CheckpointError

__all__ = ["pack", "unpack", "words_per_row"]

_RUN = 32
"""Elements that fill a whole number of words (b of them) at every width b."""


def words_per_row(num_columns: int, bits: int) -> int:
    """Return the number of words that hold a row.

    Args:
        num_columns: Number of elements in the row.
        bits: Bits of an element.

    >>> words_per_row(576, 4), words_per_row(33, 3)
    (72, 4)
    """
    return -(-num_columns * bits // 32)


def pack(Q: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed integers along the last dimension, stored with an offset of 2^(b−1).

    Args:
        Q: Integers, int8 [R, C], in [−2^(b−1), 2^(b−1)−1].
        bits: Bits b of an element, 2 to 8.

    Returns:
        Words, int32 [R, ceil(C·b/32)].
    """
    rows, columns = Q.shape
    stored = Q.long() + (1 << (bits - 1))
    stored = torch.nn.functional.pad(stored, (0, -columns % _RUN)).reshape(rows, -1, _RUN)
    words = stored.new_zeros(rows, stored.shape[1], bits)
    for i in range(_RUN):
        word, shift = divmod(i * bits, 32)
        words[..., word] |= stored[..., i] << shift
        if shift + bits > 32:
            words[..., word + 1] |= stored[..., i] >> (32 - shift)
    words = words.flatten(1)[:, : words_per_row(columns, bits)] & 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def unpack(words: torch.Tensor, bits: int, num_columns: int) -> torch.Tensor:
    """Undo `pack`.

    Args:
        words: Words, int32 [R, ceil(C·b/32)].
        bits: Bits b of an element, 2 to 8.
        num_columns: Number C of elements in a row.

    Returns:
        Integers, int8 [R, C].

    Raises:
        CheckpointError: The number of words does not fit the number of columns.
    """
    if words.shape[1] != words_per_row(num_columns, bits):
        raise CheckpointError(
            f"packed weight: expected {words_per_row(num_columns, bits)} words a row for {num_columns} columns "
            f"of {bits} bits, got {words.shape[1]}"
        )
    # The bytes of a word are in the order of its bits, so that a few numbers fill a few whole bytes.
    shared = math.gcd(bits, 8)
    num_numbers, num_bytes = 8 // shared, bits // shared
    stored = words.contiguous().view(torch.uint8)
    if stored.shape[1] % num_bytes:
        stored = torch.nn.functional.pad(stored, (0, -stored.shape[1] % num_bytes))
    runs = stored.unflatten(1, (-1, num_bytes))
    out = torch.empty(*runs.shape[:2], num_numbers, dtype=torch.uint8, device=words.device)
    for i in range(num_numbers):
        byte, shift = divmod(i * bits, 8)
        torch.bitwise_right_shift(runs[..., byte], shift, out=out[..., i])
        if shift + bits > 8:
            out[..., i] |= runs[..., byte + 1] << (8 - shift)
    # Unsigned bytes wrap around, as the signed ones that they are seen as.
    out &= (1 << bits) - 1
    out -= 1 << (bits - 1)
    return out.flatten(1)[:, :num_columns].contiguous().view(torch.int8)
