"""The rows of a table that are documents: texts, or chats as lists of messages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Chat", "Row", "Rows", "as_row", "choose_column", "size_of"]

Chat = list[dict[str, Any]]
"""The messages of a chat; each has a role and a content."""
Row = str | Chat
_AUTO = ("text", "messages", "conversations")
"""Columns that are looked for where none is named, the most likely one first."""


@dataclass(frozen=True)
class Rows:
    """Documents as a source holds them.

    Attributes:
        rows: Texts or chats, none of them empty.
        column: Name of the column that they are from; None where the source is no table.
    """

    rows: list[Row]
    column: str | None = None


def choose_column(names: Sequence[str], asked: str) -> str:
    """Choose the column that holds the documents.

    Args:
        names: Names of all columns.
        asked: Name of a column, or `auto` for the first that is there of `text`, `messages` and `conversations`.

    Raises:
        ValueError: No such column is there.
    """
    wanted = _AUTO if asked == "auto" else (asked,)
    chosen = next((name for name in wanted if name in names), None)
    if chosen is None:
        raise ValueError(f"it has no column {' or '.join(wanted)}, only {', '.join(names)}; see `column`")
    return chosen


def as_row(value: Any, column: str) -> Row | None:
    """Check a value of a column.

    Args:
        value: Value of one row.
        column: Name of the column.

    Returns:
        The text or chat; None where the row is empty.

    Raises:
        ValueError: The value is something else.
    """
    if value is None or value in ("", []):
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        # Tables hold every key in every message, templates ask which are there.
        return [{key: entry for key, entry in message.items() if entry is not None} for message in value]
    raise ValueError(f"column {column!r} holds {value!r:.60}, expected text or a list of messages; see `column`")


def size_of(row: Row) -> int:
    """Return the number of characters of a row, which for a chat leaves out what a template writes around it.

    Args:
        row: Text or chat.
    """
    return _num_characters(row)


def _num_characters(value: Any) -> int:
    """Return the number of characters of all texts in a value; the content of a message may be a list of parts."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_characters, value.values()))
    return sum(map(_num_characters, value)) if isinstance(value, list) else 0
