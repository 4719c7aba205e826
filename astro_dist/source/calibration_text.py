"""Turn text into fixed chunks of token sequences: the same text, tokenizer and settings give the same tokens."""

import dataclasses
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from astro.errors import ConfigError
from astro_dist.config.schema import CalibrationConfig
from astro_dist.schedule.names import chunk_name

__all__ = ["Chunk", "TokenChunks", "as_tensors", "chunk_tokens", "is_file", "read_documents", "tokenize"]

Tokens = npt.NDArray[np.int64]
_SUFFIXES = (".txt", ".parquet")
_HOLDOUT_EVERY = 4
"""Distance between documents that are held out: every fourth one is."""
_CHARACTERS_PER_TOKEN_WANTED = 64
"""Characters for each needed token above which a text is sampled by document before it is tokenized. That leaves some
ten times the tokens that are needed."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A chunk is a batch of sequences that pass through the model together.

    Attributes:
        name: Name of the chunk: `c0000`, `c0001`, ... for calibration, `h0000`, ... for held-out text.
        tokens: Tokens of B sequences of length T, int64 [B, T].
    """

    name: str
    tokens: Tokens


@dataclasses.dataclass(frozen=True)
class TokenChunks:
    """Token chunks are the whole text of a run, calibration first.

    Attributes:
        chunks: Chunks in the order in which they pass through the model.
        sha256: SHA-256 of all names and tokens, hex.
    """

    chunks: tuple[Chunk, ...]
    sha256: str


def as_tensors(chunks: Sequence[Chunk]) -> dict[str, torch.Tensor]:
    """Return the tokens of each chunk by name, int64 [B, T]."""
    return {chunk.name: torch.from_numpy(chunk.tokens) for chunk in chunks}


def is_file(source: str) -> bool:
    """Tell whether a calibration source names a file; if not, it names the text that ships with Python, or nothing."""
    return Path(source).suffix in _SUFFIXES


def read_documents(config: CalibrationConfig) -> list[str]:
    """Read the documents of a calibration source.

    Args:
        config: Section of the configuration that names the source.

    Raises:
        ConfigError: The source is unknown, cannot be read, or holds no text.
    """
    if config.source == "python-docs":
        from pydoc_data import topics  # 465,000 characters that ship with CPython; not needed otherwise

        documents = [text for _, text in sorted(topics.topics.items())]
    else:
        documents = _read_file(Path(config.source).expanduser(), config.text_column)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise ConfigError(f"calibration.source {config.source}: holds no text")
    return documents


def tokenize(documents: Sequence[str], tokenizer: Any, config: CalibrationConfig) -> TokenChunks:
    """Cut documents into sequences, hold out every fourth document, and take as many sequences as are asked for.

    A single document is split at three quarters of its length instead. Sequences begin with the tokenizer's BOS token
    where the tokenizer itself puts one.

    Args:
        documents: Texts.
        tokenizer: Tokenizer of the model, as transformers loads it.
        config: Section of the configuration with the number and length of the sequences and the seed that chooses them.

    Raises:
        ConfigError: The text is too short.
    """
    if len(documents) == 1:
        cut = len(documents[0]) * (_HOLDOUT_EVERY - 1) // _HOLDOUT_EVERY
        parts = [[documents[0][:cut]], [documents[0][cut:]]]
    else:
        rest = [text for i, text in enumerate(documents) if i % _HOLDOUT_EVERY != _HOLDOUT_EVERY - 1]
        parts = [rest, list(documents[_HOLDOUT_EVERY - 1 :: _HOLDOUT_EVERY])]
    parts = [
        _enough(part, count * config.sequence_length, config.seed)
        for part, count in zip(parts, (config.samples, config.holdout_samples), strict=True)
    ]
    calibration = _sequences(parts[0], tokenizer, config, config.samples, "samples")
    holdout = _sequences(parts[1], tokenizer, config, config.holdout_samples, "holdout_samples")
    chunks = [*_chunks("c", calibration, config.chunk_samples), *_chunks("h", holdout, config.chunk_samples)]
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk.name.encode() + chunk.tokens.tobytes())
    return TokenChunks(tuple(chunks), digest.hexdigest())


def chunk_tokens(config: CalibrationConfig) -> dict[str, int]:
    """Return the number of tokens of each chunk that a configuration asks for, by name, without reading any text."""
    sizes = {}
    for kind, count in (("c", config.samples), ("h", config.holdout_samples)):
        for number, start in enumerate(range(0, count, config.chunk_samples)):
            sizes[chunk_name(number, held_out=kind == "h")] = (
                min(config.chunk_samples, count - start) * config.sequence_length
            )
    return sizes


def _read_file(path: Path, column: str) -> list[str]:
    try:
        if path.suffix == ".txt":
            return [path.read_text(encoding="utf-8")]
        if path.suffix == ".parquet":
            return _read_column(path, column)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ConfigError(f"calibration.source {path}: cannot be read: {error}") from error
    raise ConfigError(f"calibration.source {path}: expected python-docs, a .txt file or a .parquet file")


def _read_column(path: Path, column: str) -> list[str]:
    import pyarrow.parquet  # slow to import, only for parquet files

    names = pyarrow.parquet.read_schema(path).names
    if column not in names:
        raise ValueError(f"it has no column {column!r}, only {', '.join(names)}; see calibration.text_column")
    texts = pyarrow.parquet.read_table(path, columns=[column])[column]
    if not (pyarrow.types.is_string(texts.type) or pyarrow.types.is_large_string(texts.type)):
        raise ValueError(f"column {column!r} holds {texts.type}, expected text; see calibration.text_column")
    return [text for text in texts.to_pylist() if text]


def _sequences(documents: Sequence[str], tokenizer: Any, config: CalibrationConfig, count: int, option: str) -> Tokens:
    length = config.sequence_length
    bos = _leading_tokens(tokenizer)
    body = length - len(bos)
    tokens: list[int] = []
    for text in documents if count else ():
        tokens.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    available = len(tokens) // body
    if available < count:
        beside = f" beside {config.holdout_samples} held out" if option == "samples" else ""
        part = "three quarters" if option == "samples" else "a quarter"
        raise ConfigError(
            f"calibration.{option}: {count} sequences of {length} tokens{beside} asked for, but the text of "
            f"{config.source} gives {available} ({part} of it, so much is for that); use more text, fewer samples or "
            "shorter sequences"
        )
    chosen = sorted(random.Random(config.seed).sample(range(available), count))
    rows = [bos + tokens[i * body : (i + 1) * body] for i in chosen]
    return np.array(rows, dtype=np.int64).reshape(count, length)


def _enough(documents: list[str], num_tokens: int, seed: int) -> list[str]:
    """Choose the documents to tokenize: all, or a random part of a large text, still much more than is needed."""
    limit = _CHARACTERS_PER_TOKEN_WANTED * num_tokens
    if len(documents) < 2 or sum(map(len, documents)) <= limit:
        return documents
    chosen, size = [], 0
    for index in random.Random(seed).sample(range(len(documents)), len(documents)):
        if size < limit:
            chosen.append(index)
            size += len(documents[index])
    return [documents[index] for index in sorted(chosen)]


def _leading_tokens(tokenizer: Any) -> list[int]:
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return list(first) if first and first[0] == tokenizer.bos_token_id else []


def _chunks(prefix: str, sequences: Tokens, size: int) -> list[Chunk]:
    return [
        Chunk(chunk_name(index, held_out=prefix == "h"), sequences[start : start + size])
        for index, start in enumerate(range(0, len(sequences), size))
    ]
