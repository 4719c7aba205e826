"""Turn text into fixed chunks of token sequences: the same text, tokenizer and settings give the same tokens."""

import array
import dataclasses
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from astro.errors import CheckpointError, ConfigError
from astro_dist.config.schema import CalibrationConfig
from astro_dist.schedule.names import chunk_name
from astro_dist.source.long_wait import LongWait
from astro_dist.source.text_files import SUFFIXES, cut_text, read_file

__all__ = ["Chunk", "TokenChunks", "as_tensors", "chunk_tokens", "is_file", "read_documents", "tokenize"]

Tokens = npt.NDArray[np.int64]
_HOLDOUT_EVERY = 4
"""Distance between documents that are held out: every fourth one is."""
_CHARACTERS_PER_TOKEN_WANTED = 64
"""Characters for each needed token above which a text is sampled before it is tokenized. That leaves some ten times the
tokens that are needed."""
_PIECE_CHARACTERS = 1 << 18
"""Characters that are tokenized together: a tokenizer needs a hundred bytes of memory for each."""


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
    return Path(source).suffix in SUFFIXES


def read_documents(config: CalibrationConfig) -> list[str]:
    """Read the documents of a calibration source; of a large file a sample, many times as much as the run needs.

    Args:
        config: Section of the configuration that names the source and says how many tokens are needed.

    Raises:
        ConfigError: The source is unknown, cannot be read, or holds no text.
    """
    if config.source == "python-docs":
        from pydoc_data import topics  # 465,000 characters that ship with CPython; not needed otherwise

        documents = [text for _, text in sorted(topics.topics.items())]
    else:
        num_tokens = (config.samples + config.holdout_samples) * config.sequence_length
        path, limit = Path(config.source).expanduser(), _CHARACTERS_PER_TOKEN_WANTED * num_tokens
        documents = read_file(path, config.text_column, limit, config.seed)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise ConfigError(f"calibration.source {config.source}: holds no text")
    return documents


def tokenize(documents: Sequence[str], tokenizer: Any, config: CalibrationConfig) -> TokenChunks:
    """Cut documents into sequences, hold out every fourth document, and take as many sequences as are asked for.

    Fewer than four documents are each split at three quarters of their length instead. Sequences begin with the tokens
    that the tokenizer puts in front of every text, such as BOS.

    Args:
        documents: Texts.
        tokenizer: Tokenizer of the model, as transformers loads it.
        config: Section of the configuration with the number and length of the sequences and the seed that chooses them.

    Raises:
        ConfigError: The text is too short, or the sequences are.
        CheckpointError: The tokenizer changes the tokens of a text where it puts others in front.
    """
    if len(documents) < _HOLDOUT_EVERY:
        cuts = [len(text) * (_HOLDOUT_EVERY - 1) // _HOLDOUT_EVERY for text in documents]
        parts = [
            [text[:cut] for text, cut in zip(documents, cuts, strict=True)],
            [text[cut:] for text, cut in zip(documents, cuts, strict=True)],
        ]
    else:
        rest = [text for i, text in enumerate(documents) if i % _HOLDOUT_EVERY != _HOLDOUT_EVERY - 1]
        parts = [rest, list(documents[_HOLDOUT_EVERY - 1 :: _HOLDOUT_EVERY])]
    parts = [
        _enough(part, count * config.sequence_length, config.seed)
        for part, count in zip(parts, (config.samples, config.holdout_samples), strict=True)
    ]
    calibration = _sequences(parts[0], tokenizer, config, config.samples, "samples")
    holdout = _sequences(parts[1], tokenizer, config, config.holdout_samples, "holdout_samples")
    size = config.settled_chunk_samples
    chunks = [*_chunks("c", calibration, size), *_chunks("h", holdout, size)]
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk.name.encode() + chunk.tokens.tobytes())
    return TokenChunks(tuple(chunks), digest.hexdigest())


def chunk_tokens(config: CalibrationConfig) -> dict[str, int]:
    """Return the number of tokens of each chunk that a configuration asks for, by name, without reading any text."""
    sizes, size = {}, config.settled_chunk_samples
    for kind, count in (("c", config.samples), ("h", config.holdout_samples)):
        for number, start in enumerate(range(0, count, size)):
            sizes[chunk_name(number, held_out=kind == "h")] = min(size, count - start) * config.sequence_length
    return sizes


def _sequences(documents: Sequence[str], tokenizer: Any, config: CalibrationConfig, count: int, option: str) -> Tokens:
    length = config.sequence_length
    prefix = _leading_tokens(tokenizer)
    body = length - len(prefix)
    if body < 1:
        raise ConfigError(
            f"calibration.sequence_length: {length} tokens have no room for text, the tokenizer begins every text with "
            f"{len(prefix)} tokens"
        )
    tokens = _tokens_of(documents if count else (), tokenizer)
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
    rows = [[*prefix, *tokens[i * body : (i + 1) * body]] for i in chosen]
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


def _tokens_of(documents: Sequence[str], tokenizer: Any) -> "array.array[int]":
    """Return the tokens of all documents, one after the other."""
    tokens, done = array.array("q"), 0
    wait = LongWait("calibration text: tokenized", sum(map(len, documents)) / 1e6, "million characters")
    for text in documents:
        for piece in cut_text(text, _PIECE_CHARACTERS):
            tokens.extend(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
            done += len(piece)
            wait.reached(done / 1e6)
    return tokens


def _leading_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts in front of every text: BOS, or several, as GLM's do, or none."""
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    text = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    start = next((start for start in range(len(whole)) if whole[start : start + len(text)] == text), None)
    if start is None or not text:
        raise CheckpointError(
            f"its tokenizer makes {text} of the text 'a' alone, and {whole} with the tokens that belong around it, so "
            "that nothing tells which of these come first; give the model's own tokenizer"
        )
    return whole[:start]


def _chunks(prefix: str, sequences: Tokens, size: int) -> list[Chunk]:
    return [
        Chunk(chunk_name(index, held_out=prefix == "h"), sequences[start : start + size])
        for index, start in enumerate(range(0, len(sequences), size))
    ]
