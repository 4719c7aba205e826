"""Read every row of a text in its order, the empty ones too, as a perplexity is measured on them."""

import zlib
from collections.abc import Iterator
from pathlib import Path

from astro.errors import ConfigError
from astro_dist.config.schema import TextSource
from astro_dist.config.text_place import FILE_SUFFIXES, PYTHON_DOCS, is_dataset, is_file
from astro_dist.source.documents import Wanted, read_text
from astro_dist.source.json_lines import json_objects
from astro_dist.source.parquet_column import column_values, open_parquet
from astro_dist.source.rows import choose_column

__all__ = ["read_rows", "require_place"]


def require_place(source: TextSource, option: str) -> None:
    """Refuse a text whose place says already that it cannot be read.

    Args:
        source: `python-docs`, path of a file, or name, subset, split and revision of a dataset on the Hub.
        option: Option or key that names the text, for messages.

    Raises:
        ConfigError: It is neither a file of a known kind nor a dataset, or the file is not there.
    """
    if source.source == PYTHON_DOCS or is_dataset(source.source):
        return
    if not is_file(source.source):
        raise ConfigError(
            f"{option} {source.source}: expected {PYTHON_DOCS}, a file (*{', *'.join(FILE_SUFFIXES)}), or a dataset on "
            "the Hub (ORG/NAME)"
        )
    if source.subset is not None or source.revision is not None:
        raise ConfigError(f"{option} {source.source}: only a dataset on the Hub has a subset or a revision")
    if not Path(source.source).expanduser().is_file():
        place = Path(source.source).expanduser()
        where = "" if place.is_absolute() else f" in {Path.cwd()}"
        raise ConfigError(f"{option} {source.source}: there is no such file{where}")


def read_rows(source: TextSource, option: str) -> Iterator[str]:
    """Yield the rows of a text, a few in memory at a time.

    Args:
        source: Path of a file, or name, subset, split and revision of a dataset on the Hub; and the column that holds
            the text. A .txt file is one row. The rows of `python-docs` are its topics.
        option: Option or key that names the text, for messages.

    Raises:
        ConfigError: The text is not there, cannot be read, or its column holds something else.
    """
    require_place(source, option)
    try:
        yield from _rows(source, option)
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zlib.error) as error:
        raise ConfigError(f"{option} {source.source}: cannot be read: {error}") from error


def _rows(source: TextSource, option: str) -> Iterator[str]:
    path = Path(source.source).expanduser()
    if source.source == PYTHON_DOCS:
        shipped = TextSource(source=PYTHON_DOCS, share=1.0)  # which has no splits, whatever is asked of others
        wanted = Wanted(num_characters=0, seed=0)
        yield from (document.text for document in read_text(shipped, wanted, None).documents)
    elif is_dataset(source.source):
        from astro_dist.source.hub_dataset import rows_in_order  # slow to import, and mostly not needed

        for number, (value, column) in enumerate(rows_in_order(source, option), 1):
            yield _text(value, column, f"row {number}")
    elif path.suffix == ".txt":
        yield path.read_text(encoding="utf-8-sig")
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path, source.column)
    else:
        column = source.column
        for number, content in json_objects(path):
            column = choose_column(list(content), column)
            yield _text(content[column], column, f"line {number}")


def _parquet_rows(path: Path, asked: str) -> Iterator[str]:
    with open_parquet(path) as file:
        column = choose_column(file.schema_arrow.names, asked)
        for number, value in enumerate(column_values(file, column), 1):
            yield _text(value, column, f"row {number}")


def _text(value: object, column: str, place: str) -> str:
    """Return the text of a row, empty where the row is."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise ValueError(f"{place}: expected text in column {column!r}, got {value!r:.60}; see `column`")
