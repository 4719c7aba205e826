"""Small integers in int32 words: dense, least significant bits first, as compressed-tensors stores them.

Element i of a row takes bits i·b to i·b + b − 1 of the row's bit string; for 3 bits an element may cross a word border.

Elements begin as bytes. Neighbours are joined two by two: a pair of elements in one integer of twice the size, whose
lower half keeps its place and whose upper half is shifted down beside it. After at most three joins the bits fill whole
bytes, because eight elements fill b of them:

    4 bits   0000aaaa 0000bbbb                      →  00000000 bbbbaaaa
    3 bits   00000aaa 00000bbb 00000ccc 00000ddd    →  0000000000bbbaaa 0000000000dddccc  →  ...

Every step is a shift, a mask or a copy of the whole matrix in a dtype of at most 64 bits with a sign, which any device
of torch has. Shapes: R rows, C columns.
"""

import torch

from astro.errors import CheckpointError

__all__ = ["pack", "unpack", "words_per_row"]

_RUN = 32
"""Elements that fill a whole number of words (b of them) at every width b."""
_SIZES = (torch.uint8, torch.int16, torch.int32, torch.int64)
"""Integers of 1, 2, 4 and 8 elements, a byte each."""
_NEAR_ELEMENTS = 1 << 18
"""Elements that a CPU takes through all steps at once, so that they stay in its caches."""


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
        Q: Integers, int8 [R, C] on any device, in [−2^(b−1), 2^(b−1)−1].
        bits: Bits b of an element, 2 to 8.

    Returns:
        Words, int32 [R, ceil(C·b/32)] on the same device.
    """
    words = torch.empty(len(Q), words_per_row(Q.shape[1], bits), dtype=torch.int32, device=Q.device)
    for rows in _near_rows(Q):
        words[rows] = _packed(Q[rows], bits)[:, : words.shape[1]]
    return words


def unpack(words: torch.Tensor, bits: int, num_columns: int) -> torch.Tensor:
    """Undo `pack`.

    Args:
        words: Words, int32 [R, ceil(C·b/32)] on any device.
        bits: Bits b of an element, 2 to 8.
        num_columns: Number C of elements in a row.

    Returns:
        Integers, int8 [R, C] on the same device.

    Raises:
        CheckpointError: The number of words does not fit the number of columns.
    """
    if words.shape[1] != words_per_row(num_columns, bits):
        raise CheckpointError(
            f"packed weight: expected {words_per_row(num_columns, bits)} words a row for {num_columns} columns "
            f"of {bits} bits, got {words.shape[1]}"
        )
    Q = torch.empty(len(words), num_columns, dtype=torch.int8, device=words.device)
    for rows in _near_rows(Q):
        Q[rows] = _unpacked(words[rows], bits)[:, :num_columns]
    return Q


def _near_rows(Q: torch.Tensor) -> list[slice]:
    """Cut rows so that a CPU has each part at hand in all steps. A GPU wants all rows at once."""
    height = max(_NEAR_ELEMENTS // max(Q.shape[1], 1), 1) if Q.device.type == "cpu" else max(len(Q), 1)
    return [slice(start, start + height) for start in range(0, len(Q), height)]


def _num_joins(bits: int) -> int:
    """Return how often neighbours are joined before their bits fill whole bytes."""
    return next(joins for joins in range(len(_SIZES)) if (bits << joins) % 8 == 0)


def _packed(Q: torch.Tensor, bits: int) -> torch.Tensor:
    """Words of some rows, int32 [R, W], with columns added up to a multiple of `_RUN`."""
    rows, columns = Q.shape
    X = torch.zeros(rows, columns + -columns % _RUN, dtype=torch.uint8, device=Q.device)
    # Bytes wrap around, so that the sum is the unsigned number.
    torch.add(Q.view(torch.uint8), 1 << (bits - 1), out=X[:, :columns])
    joins = _num_joins(bits)
    for join in range(joins):
        half, width = 8 << join, bits << join  # bits of an element before this join, and how many of them are used
        X = X.view(_SIZES[join + 1])
        mask = (1 << width) - 1
        X = (X >> (half - width)).bitwise_and_(mask << width).bitwise_or_(X & mask)
    num_bytes = (bits << joins) // 8
    # A cast keeps the first byte of each, and is faster than a copy of it.
    used = X.to(torch.uint8) if num_bytes == 1 else _bytes_of(X)[..., :num_bytes].flatten(-2)
    return used.contiguous().view(torch.int32)


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers of some rows, int8 [R, C], with columns added up to a multiple of `_RUN`."""
    joins = _num_joins(bits)
    num_bytes = (bits << joins) // 8
    used = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).contiguous().view(torch.uint8)
    if num_bytes == 1:
        X = used.to(_SIZES[joins])
    else:
        X = used.new_zeros(len(used), used.shape[1] // num_bytes, dtype=_SIZES[joins])
        _bytes_of(X)[..., :num_bytes] = used.unflatten(1, (-1, num_bytes))
    for join in reversed(range(joins)):
        half, width = 8 << join, bits << join
        mask = (1 << width) - 1
        X = (X << (half - width)).bitwise_and_(mask << half).bitwise_or_(X & mask).view(_SIZES[join])
    return (X - (1 << (bits - 1))).view(torch.int8)


def _bytes_of(X: torch.Tensor) -> torch.Tensor:
    """The bytes of integers [R, N] as a view, uint8 [R, N, size of one], the least significant first."""
    as_bytes: torch.Tensor = X.view(torch.uint8).unflatten(-1, (-1, X.itemsize))
    return as_bytes
