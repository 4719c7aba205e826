"""What the name of a calibration text says of its place: text that Python ships, a file, or a dataset on the Hub."""

import re
from pathlib import Path, PurePath

__all__ = ["FILE_SUFFIXES", "PYTHON_DOCS", "is_dataset", "is_file", "name_elsewhere"]

PYTHON_DOCS = "python-docs"
"""The name of the Python language reference that every CPython ships."""
FILE_SUFFIXES = (".txt", ".parquet", ".jsonl", ".json", ".jsonl.gz")
"""Endings of the names of files that can be read."""
_DATASET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_file(source: str) -> bool:
    """Tell whether a calibration source names a file that can be read.

    Args:
        source: Value of `calibration.source`.
    """
    return source.endswith(FILE_SUFFIXES)


def name_elsewhere(source: str) -> str:
    """Return the name of a calibration text for those who do not know the folders of this machine: a file has no path.

    Args:
        source: Value of `calibration.source`.
    """
    return PurePath(source).name if is_file(source) else source


def is_dataset(source: str) -> bool:
    """Tell whether a calibration source names a dataset on the Hub. What lies here under that name comes first.

    Args:
        source: Value of `calibration.source`.
    """
    if source == PYTHON_DOCS or is_file(source) or not _DATASET.fullmatch(source):
        return False
    return not Path(source).expanduser().exists()
