"""Small integers in int32 words: dense, least significant bits first, as compressed-tensors stores them.

Element i of a row takes bits i·b to i·b + b − 1 of the row's bit string; for 3 bits an element may cross a word border.
"""

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
        bits: Bits b of an element: 2, 3, 4 or 8.

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
        bits: Bits b of an element: 2, 3, 4 or 8.
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
    if 8 % bits == 0:
        return _unpack_bytes(words, bits, num_columns)
    W = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, -words.shape[1] % bits)).reshape(len(words), -1, bits)
    out = W.new_empty(W.shape[0], W.shape[1], _RUN)
    for i in range(_RUN):
        word, shift = divmod(i * bits, 32)
        value = W[..., word] >> shift
        if shift + bits > 32:
            value = value | (W[..., word + 1] << (32 - shift))
        out[..., i] = value & ((1 << bits) - 1)
    return (out.flatten(1)[:, :num_columns] - (1 << (bits - 1))).to(torch.int8)


def _unpack_bytes(words: torch.Tensor, bits: int, num_columns: int) -> torch.Tensor:
    """Undo `pack` where no element crosses the border of a byte; bytes of a word are in the order of their bits."""
    stored = words.contiguous().view(torch.uint8)
    out = torch.empty(*stored.shape, 8 // bits, dtype=torch.uint8, device=words.device)
    for i in range(8 // bits):
        torch.bitwise_right_shift(stored, i * bits, out=out[..., i])
    unsigned = out.flatten(1)[:, :num_columns] & ((1 << bits) - 1)
    return unsigned.to(torch.int16).sub_(1 << (bits - 1)).to(torch.int8)
