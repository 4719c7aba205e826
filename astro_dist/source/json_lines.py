"""Read documents from files with one JSON object on each line."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from astro_dist.source.rows import Row, Rows, as_row, choose_column, size_of
from astro_dist.source.sampling import sampled

__all__ = ["json_objects", "read_json_lines"]

_ENCODING = "utf-8-sig"
"""UTF-8, with or without the mark at the beginning that some editors write."""


def read_json_lines(path: Path, asked: str, num_characters: int, seed: int) -> Rows:
    """Read one column; of a large file a random sample of it. Rows that lack the column are empty.

    Args:
        path: Path of a .jsonl, .json or .jsonl.gz file.
        asked: Name of the column, or `auto`.
        num_characters: Number of characters above half of which the file is sampled.
        seed: Seed of the sample.

    Raises:
        ValueError: A line is no JSON object, or the column is missing in the first one or holds something else.
    """
    column = _column(path, asked)
    rows: list[Row] = []
    size, most = 0, 2 * num_characters
    for row in _rows(path, column):  # once for the size, and again only if not everything is taken
        size += size_of(row)
        if size <= most:
            rows.append(row)
    return Rows(rows if size <= most else list(sampled(_rows(path, column), size, num_characters, seed)), column)


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return cast(IO[str], gzip.open(path, "rt", encoding=_ENCODING))
    return path.open(encoding=_ENCODING)


def _column(path: Path, asked: str) -> str:
    _, first = next(json_objects(path), (0, None))
    if first is None:
        return asked
    return choose_column(list(first), asked)


def json_objects(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield the number of each line that is not blank, and its object.

    Args:
        path: Path of a .jsonl, .json or .jsonl.gz file.

    Raises:
        ValueError: A line is no JSON object.
    """
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON ({error}); expected one object on each line") from error
            if not isinstance(content, dict):
                raise ValueError(f"line {number} holds {line.strip()[:40]!r}, expected one JSON object on each line")
            yield number, content


def _rows(path: Path, column: str) -> Iterator[Row]:
    for number, content in json_objects(path):
        try:
            row = as_row(content.get(column), column)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if row is not None:
            yield row
