"""Read documents from files. Of a large file a random sample is read: memory does not grow with the file."""

import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from astro.errors import ConfigError
from astro_dist.source.json_lines import read_json_lines
from astro_dist.source.parquet_column import column_values, open_parquet
from astro_dist.source.rows import Row, Rows, as_row, choose_column
from astro_dist.source.sampling import NUM_PIECES, SMALLEST_PIECE, piece_size, sampled

__all__ = ["read_file"]

_SEAM_BYTES = 256
"""Bytes in which the end of a word is looked for where a text is cut. Some scripts have no spaces."""


def read_file(path: Path, column: str, num_characters: int, seed: int) -> Rows:
    """Read the documents of a file; of a larger one about as many characters as are asked for, from all over it.

    A .txt file is one document. Where it is sampled, each piece is a document.

    Args:
        path: Path of a file with one of the endings `FILE_SUFFIXES` of `config.text_place`.
        column: Name of the column that holds the documents, or `auto`; a .txt file has none.
        num_characters: Number of characters above which the file is sampled. Fewer than 64 of the smallest pieces are
            never asked of a large file: part of its pieces are held out.
        seed: Seed of the sample.

    Raises:
        ConfigError: The file is of another kind, or cannot be read.
    """
    num_characters = max(num_characters, NUM_PIECES * SMALLEST_PIECE)
    try:
        if path.suffix == ".txt":
            return Rows([*_read_txt(path, num_characters, seed)])
        if path.suffix == ".parquet":
            return _read_parquet(path, column, num_characters, seed)
        return read_json_lines(path, column, num_characters, seed)
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zlib.error) as error:
        raise ConfigError(f"calibration.source {path}: cannot be read: {error}") from error


def _read_txt(path: Path, num_characters: int, seed: int) -> list[str]:
    size_bytes = path.stat().st_size
    if size_bytes <= num_characters:
        return [path.read_text(encoding="utf-8-sig")]
    size = piece_size(num_characters)
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


def _read_parquet(path: Path, asked: str, num_characters: int, seed: int) -> Rows:
    import pyarrow.types  # slow to import, only for parquet files

    with open_parquet(path) as file:
        column = choose_column(file.schema_arrow.names, asked)
        kind, types = file.schema_arrow.field(column).type, pyarrow.types
        is_text = types.is_string(kind) or types.is_large_string(kind)
        if not is_text and not (types.is_list(kind) or types.is_large_list(kind)):
            raise ValueError(f"column {column!r} holds {kind}, expected text or lists of messages; see `column`")
        return Rows([*sampled(_rows(file, column), _column_bytes(file, column), num_characters, seed)], column)


def _rows(file: Any, column: str) -> Iterator[Row]:
    """Yield the rows of a column that are not empty, a few in memory at a time."""
    for value in column_values(file, column):
        row = as_row(value, column)
        if row is not None:
            yield row


def _column_bytes(file: Any, column: str) -> int:
    """Return the size of a column's values in bytes, not compressed. Repeated values may count once."""
    metadata = file.metadata
    chunks = (
        metadata.row_group(group).column(number)
        for group in range(metadata.num_row_groups)
        for number in range(metadata.num_columns)
    )
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
