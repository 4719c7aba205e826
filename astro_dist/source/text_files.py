"""Read documents from text files. Of a large file a random sample is read: memory does not grow with the file."""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from astro.errors import ConfigError
from astro_dist.source.long_wait import LongWait

__all__ = ["SUFFIXES", "cut_text", "read_file"]

SUFFIXES = (".txt", ".parquet")
"""Endings of the names of files that can be read."""
_NUM_PIECES = 64
"""Least number of pieces that a sample of a large text consists of, so that it comes from all over the text."""
_SMALLEST_PIECE, _LARGEST_PIECE = 1 << 10, 1 << 16
"""Bounds of the size of such a piece, in characters."""
_SEAM_BYTES = 256
"""Bytes in which the end of a word is looked for where a text is cut. Some scripts have no spaces."""
_BATCH_ROWS = 256
_LINE_START, _WORD_START = re.compile(r"(?<=\n)\S"), re.compile(r"\s\S")


def read_file(path: Path, column: str, num_characters: int, seed: int) -> list[str]:
    """Read the documents of a file; of a larger one about as many characters as are asked for, from all over it.

    A .txt file is one document. Where it is sampled, each piece is a document.

    Args:
        path: Path of a .txt or .parquet file.
        column: Name of the column of a .parquet file that holds the text.
        num_characters: Number of characters above which the file is sampled. Fewer than 64 of the smallest pieces are
            never asked of a large file: part of its pieces are held out.
        seed: Seed of the sample.

    Raises:
        ConfigError: The file is of another kind, or cannot be read.
    """
    num_characters = max(num_characters, _NUM_PIECES * _SMALLEST_PIECE)
    try:
        if path.suffix == ".txt":
            return _read_txt(path, num_characters, seed)
        if path.suffix == ".parquet":
            return _read_parquet(path, column, num_characters, seed)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ConfigError(f"calibration.source {path}: cannot be read: {error}") from error
    raise ConfigError(f"calibration.source {path}: expected python-docs, a .txt file or a .parquet file")


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


def _piece_size(num_characters: int) -> int:
    """Return the size of the pieces of a sample of so many characters."""
    return min(max(num_characters // _NUM_PIECES, _SMALLEST_PIECE), _LARGEST_PIECE)


def _read_txt(path: Path, num_characters: int, seed: int) -> list[str]:
    size_bytes = path.stat().st_size
    if size_bytes <= num_characters:
        return [path.read_text(encoding="utf-8")]
    size = _piece_size(num_characters)
    places = -(-size_bytes // size)
    chosen = sorted(random.Random(seed).sample(range(places), min(places, -(-num_characters // size))))
    documents = []
    with path.open("rb") as file:
        for place in chosen:
            file.seek(place * size)
            content = file.read(size + _SEAM_BYTES)
            start = _seam(content[:_SEAM_BYTES]) if place else 0
            piece = content[start : size + _seam(content[size:])]
            documents.append(piece.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n"))
    return documents


def _seam(window: bytes) -> int:
    """Return where to cut: before the first white space, else before the first character that begins in the window."""
    space = re.search(rb"\s", window)
    if space:
        return space.start()
    return next((index for index, byte in enumerate(window) if byte & 0xC0 != 0x80), 0)


def _read_parquet(path: Path, column: str, num_characters: int, seed: int) -> list[str]:
    import pyarrow.parquet  # slow to import, only for parquet files

    # Without a buffer size and with read-ahead, pyarrow would read whole row groups, which may be gigabytes.
    with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise ValueError(f"it has no column {column!r}, only {', '.join(names)}; see calibration.text_column")
        kind = file.schema_arrow.field(column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ValueError(f"column {column!r} holds {kind}, expected text; see calibration.text_column")
        return list(_sampled(_rows(file, column), _column_bytes(file, column), num_characters, seed))


def _rows(file: Any, column: str) -> Iterator[str]:
    """Yield the texts of a column that are not empty, a few rows in memory at a time."""
    for batch in file.iter_batches(_BATCH_ROWS, columns=[column], use_threads=False):
        for text in batch.column(0).to_pylist():
            if text:
                yield text


def _column_bytes(file: Any, column: str) -> int:
    """Return the size of a column's values in bytes, not compressed. Repeated values may count once."""
    metadata = file.metadata
    chunks = (
        metadata.row_group(group).column(number)
        for group in range(metadata.num_row_groups)
        for number in range(metadata.num_columns)
    )
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)


def _sampled(texts: Iterator[str], size_bytes: int, num_characters: int, seed: int) -> Iterator[str]:
    """Yield all texts of a small column; of a large one pieces that are drawn at random, each as likely as any other.

    Twice as many characters are drawn as are asked for, since the size counts bytes, and repeated values once.
    """
    if size_bytes <= 2 * num_characters:
        yield from texts
        return
    draw, share, size = random.Random(seed), 2 * num_characters / size_bytes, _piece_size(num_characters)
    wait, done = LongWait("calibration text: read", size_bytes / 1e6, "MB"), 0
    for text in texts:
        done += len(text)
        wait.reached(done / 1e6)
        for piece in cut_text(text, size):
            if draw.random() < share:
                yield piece
