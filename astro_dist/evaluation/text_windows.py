"""The text that a perplexity is measured on, cut into windows of tokens as the papers of GPTQ and its followers do.

Documents are joined by an empty line, tokenized once, and cut into windows of one length; what is left behind the last
window is not used. Their figures for WikiText-2 come from its test split with every row, the empty ones too, and
windows of 2048 tokens.
"""

import dataclasses
import json
from pathlib import Path

import torch
import transformers

from astro.errors import CheckpointError, ConfigError

__all__ = ["SUFFIXES", "TextWindows", "cut_windows", "read_rows", "require_known"]

SUFFIXES = (".parquet", ".jsonl", ".txt")
"""Endings of the names of files that can be read."""
_JOINT = "\n\n"


@dataclasses.dataclass(frozen=True)
class TextWindows:
    """Windows of a text.

    Attributes:
        source: Where the text is from, in words.
        input_ids: Tokens of the windows, int64 [N, T].
        num_tokens: Number of tokens of the whole text.
    """

    source: str
    input_ids: torch.Tensor
    num_tokens: int


def read_rows(source: str, column: str) -> list[str]:
    """Read every row of a file of text, in order, the empty ones too.

    Args:
        source: Path of a .parquet, .jsonl or .txt file; a .txt file is one row.
        column: Name of the column, or of the key of each JSON object, that holds the text.

    Raises:
        ConfigError: The file is not there, is of another kind, or has no such column.
    """
    path = Path(source).expanduser()
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--text {source}: expected a file whose name ends in {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".txt":
            return [path.read_text(encoding="utf-8")]
        return _jsonl_rows(path, column) if path.suffix == ".jsonl" else _parquet_rows(path, column)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ConfigError(f"--text {path}: cannot be read: {error}") from error


def cut_windows(
    source: str, rows: list[str], tokenizer: transformers.PreTrainedTokenizerBase, length: int, limit: int | None
) -> TextWindows:
    """Tokenize a text once and cut it into windows.

    Args:
        source: Where the text is from, in words.
        rows: The documents.
        tokenizer: Tokenizer of the model, which may put its first token in front of the text.
        length: Number of tokens of a window.
        limit: Largest number of windows, taken from the beginning; None for all.

    Raises:
        ConfigError: The text has too few tokens for a window.
    """
    encoded = tokenizer(_JOINT.join(rows), verbose=False)
    tokens = torch.tensor(encoded["input_ids"], dtype=torch.int64).flatten()
    count = len(tokens) // length
    if not count:
        raise ConfigError(
            f"--text {source}: has {len(tokens)} tokens, expected at least one window of {length}; use more text, or "
            "shorter windows with --window"
        )
    count = min(count, limit or count)
    return TextWindows(source, tokens[: count * length].view(count, length), len(tokens))


def require_known(input_ids: torch.Tensor, vocab_size: int, name: str) -> None:
    """Refuse tokens that a model does not have.

    Args:
        input_ids: The tokens.
        vocab_size: Number of tokens that the model has.
        name: What the message calls the model.

    Raises:
        CheckpointError: A token is too large.
    """
    largest = int(input_ids.max())
    if largest >= vocab_size:
        raise CheckpointError(
            f"{name}: its tokenizer gives token {largest}, but the model has a vocabulary of {vocab_size}; tokenizer "
            "and config.json are of different models"
        )


def _jsonl_rows(path: Path, column: str) -> list[str]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            content = json.loads(line)
            text = content.get(column) if isinstance(content, dict) else content
            if not isinstance(text, str):
                raise ValueError(f"line {number}: expected an object with a text under {column!r} (--column)")
            rows.append(text)
    return rows


def _parquet_rows(path: Path, column: str) -> list[str]:
    import pyarrow
    import pyarrow.parquet  # slow to import, only for parquet files

    schema = pyarrow.parquet.read_schema(path)
    if column not in schema.names:
        raise ValueError(f"it has no column {column!r}, only {', '.join(schema.names)}; see --column")
    kind = schema.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ValueError(f"column {column!r} holds {kind}, expected text; see --column")
    values = pyarrow.parquet.read_table(path, columns=[column]).column(0).to_pylist()
    return [value or "" for value in values]
