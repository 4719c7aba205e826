"""Cut texts into pieces, and draw a random sample of documents without holding all of them."""

import random
import re
from collections.abc import Iterable, Iterator

from astro_dist.source.long_wait import LongWait
from astro_dist.source.rows import Row, size_of

__all__ = ["NUM_PIECES", "SMALLEST_PIECE", "cut_text", "piece_size", "sampled"]

NUM_PIECES = 64
"""Least number of pieces that a sample of a large text consists of, so that it comes from all over the text."""
SMALLEST_PIECE, _LARGEST_PIECE = 1 << 10, 1 << 16
"""Bounds of the size of such a piece, in characters."""
_LINE_START, _WORD_START = re.compile(r"(?<=\n)\S"), re.compile(r"\s\S")


def cut_text(text: str, size: int) -> Iterator[str]:
    """Cut a text into pieces of at most a size, behind the end of a line or before a word where there is one.

    Args:
        text: Text to cut.
        size: Largest number of characters of a piece.

    Yields:
        The pieces; joined they are the text.
    """
    start = 0
    while len(text) - start > size:
        middle, limit = start + size // 2, start + size
        seam = next(
            (match.start() for pattern in (_LINE_START, _WORD_START) if (match := pattern.search(text, middle, limit))),
            limit,
        )
        yield text[start:seam]
        start = seam
    yield text[start:]


def piece_size(num_characters: int) -> int:
    """Return the size in characters of the pieces of a sample.

    Args:
        num_characters: Number of characters of the whole sample.
    """
    return min(max(num_characters // NUM_PIECES, SMALLEST_PIECE), _LARGEST_PIECE)


def sampled(rows: Iterable[Row], size: int, num_characters: int, seed: int) -> Iterator[Row]:
    """Yield all rows of a small column; of a large one some that are drawn at random, each as likely as any other.

    Texts are drawn in pieces, chats as a whole. Twice as many characters are drawn as are asked for, since a size may
    count bytes, and repeated values once.

    Args:
        rows: Rows in their order.
        size: Size of all rows in characters or bytes.
        num_characters: Number of characters that are asked for.
        seed: Seed of the sample.
    """
    if size <= 2 * num_characters:
        yield from rows
        return
    draw, share, length = random.Random(seed), 2 * num_characters / size, piece_size(num_characters)
    wait, done = LongWait("calibration text: read", size / 1e6, "MB"), 0
    for row in rows:
        done += size_of(row)
        wait.reached(done / 1e6)
        for piece in cut_text(row, length) if isinstance(row, str) else (row,):
            if draw.random() < share:
                yield piece
