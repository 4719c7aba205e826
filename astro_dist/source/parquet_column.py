"""One column of a parquet file, a few rows in memory at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["column_values", "open_parquet"]

_BATCH_ROWS = 256


def open_parquet(path: Path) -> Any:
    """Open a parquet file of any size, as a context.

    Args:
        path: Path of the file.
    """
    import pyarrow.parquet  # slow to import, only for parquet files

    # Without a buffer size and with read-ahead, pyarrow would read whole row groups, which may be gigabytes.
    return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def column_values(file: Any, column: str) -> Iterator[Any]:
    """Yield the values of a column in their order, the empty ones too.

    Args:
        file: File that `open_parquet` opened.
        column: Name of the column.
    """
    for batch in file.iter_batches(_BATCH_ROWS, columns=[column], use_threads=False):
        yield from batch.column(0).to_pylist()
