"""Turn texts into fixed chunks of token sequences: the same texts, tokenizer and settings give the same tokens."""

import dataclasses
import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from astro.errors import ConfigError
from astro_dist.config.schema import CalibrationConfig, TextSource
from astro_dist.schedule.names import chunk_name
from astro_dist.source.documents import CalibrationText, Document, Wanted, read_text
from astro_dist.source.text_shares import Demand, apportion, settle
from astro_dist.source.text_tokens import TextTokenizer

__all__ = ["Chunk", "TextShare", "TokenChunks", "as_tensors", "chunk_tokens", "read_texts", "tokenize"]

Tokens = npt.NDArray[np.int64]
_HOLDOUT_EVERY = 4
"""Distance between documents that are held out: every fourth one is."""
_CHARACTERS_PER_TOKEN_WANTED = 64
"""Characters for each needed token above which a text is sampled before it is tokenized. That leaves some ten times the
tokens that are needed."""
_LEAST_SAMPLES = 8
"""Sequences to calibrate on that a text must have if nobody said how many there shall be."""


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
class TextShare:
    """What a run really took of one text.

    Attributes:
        source: Place of the text, as the configuration names it, and the share that was asked for.
        commit: Commit of the dataset's repository on the Hub; None for other texts.
        samples: Number of its sequences to calibrate on.
        holdout_samples: Number of its held-out sequences.
    """

    source: TextSource
    commit: str | None
    samples: int
    holdout_samples: int

    def to_json(self) -> dict[str, Any]:
        """Return what run.json records of the text."""
        plain = {**self.source.model_dump(mode="json"), "commit": self.commit}
        counts = {"samples": self.samples, "holdout_samples": self.holdout_samples}
        return {name: value for name, value in plain.items() if value is not None} | counts


@dataclasses.dataclass(frozen=True)
class TokenChunks:
    """Token chunks are the whole text of a run, calibration first.

    Attributes:
        chunks: Chunks in the order in which they pass through the model.
        sha256: SHA-256 of all names and tokens, hex.
        num_leading: Number of tokens that the tokenizer puts in front of every sequence, and that are no text.
        shares: What was taken of each text.
        notes: Sentences that the user should read.
    """

    chunks: tuple[Chunk, ...]
    sha256: str
    num_leading: int
    shares: tuple[TextShare, ...]
    notes: tuple[str, ...]

    def settled(self, config: CalibrationConfig) -> CalibrationConfig:
        """Return the section of the configuration with the numbers of sequences that there really are.

        Args:
            config: Section of the configuration.
        """
        samples = sum(share.samples for share in self.shares)
        holdout_samples = sum(share.holdout_samples for share in self.shares)
        return config.model_copy(update={"samples": samples, "holdout_samples": holdout_samples})


@dataclasses.dataclass(frozen=True)
class _Taken:
    """Sequences to calibrate on, or held out.

    Attributes:
        sequences: Their tokens, int64 [N, T].
        counts: Number of sequences of each text.
    """

    sequences: Tokens
    counts: list[int]


def as_tensors(chunks: Sequence[Chunk]) -> dict[str, torch.Tensor]:
    """Return the tokens of each chunk by name, int64 [B, T]."""
    return {chunk.name: torch.from_numpy(chunk.tokens) for chunk in chunks}


def read_texts(
    config: CalibrationConfig, tokenizer: Any, commits: Mapping[tuple[str, str | None], str] | None = None
) -> list[CalibrationText]:
    """Read the documents of every text; of a large one a sample, many times as much as the run needs.

    Args:
        config: Section of the configuration that names the texts and says how many tokens are needed.
        tokenizer: Tokenizer of the model, as transformers loads it.
        commits: Commits of datasets that the run was begun with, by name and revision in the configuration.

    Raises:
        ConfigError: A source is unknown, cannot be read, or holds no text.
    """
    needed = (config.most_samples + config.most_holdout_samples) * config.longest_sequence
    limit = _CHARACTERS_PER_TOKEN_WANTED * needed
    return [
        read_text(
            text,
            Wanted(round(limit * text.share), config.seed, (commits or {}).get((text.source, text.revision))),
            tokenizer,
        )
        for text in config.texts
    ]


def tokenize(texts: Sequence[CalibrationText], tokenizer: Any, config: CalibrationConfig) -> TokenChunks:
    """Cut documents into sequences, hold out every fourth document, and take as many sequences as are asked for.

    Fewer than four documents are each split at three quarters of their length instead. Documents are packed: each
    begins where the one before ends, so that short ones share a sequence and long ones fill several. Sequences begin
    with the tokens that the tokenizer puts in front of every text, such as BOS.

    Args:
        texts: Documents of each text, with the share of the sequences that it has.
        tokenizer: Tokenizer of the model, as transformers loads it.
        config: Section of the configuration with the number and length of the sequences and the seed that chooses them.

    Raises:
        ConfigError: A text is too short, or the sequences are.
        CheckpointError: The tokenizer changes the tokens of a text where it puts others in front.
    """
    of_text = TextTokenizer(tokenizer)
    body = config.longest_sequence - len(of_text.leading)
    if body < 1:
        raise ConfigError(
            f"calibration.sequence_length: {config.longest_sequence} tokens have no room for text, the "
            f"tokenizer begins every text with {len(of_text.leading)} tokens"
        )
    notes = [note for text in texts for note in text.notes]
    taken = []
    for demand, parts in zip(
        _demands(config), zip(*(_split(text.documents) for text in texts), strict=True), strict=True
    ):
        taken.append(_take(demand, texts, parts, of_text, config.seed))
        if sum(taken[-1].counts) < demand.count:
            notes.append(
                f"calibration.{demand.option}: {sum(taken[-1].counts)} sequences of {demand.length} tokens instead of "
                f"{demand.count}, because the text has no more; more text gives a better result"
            )
    if of_text.num_lookalikes:
        notes.append(
            f"calibration text: {of_text.num_lookalikes} places look like special tokens of the model and are read as "
            "plain text"
        )
    chunks = [
        chunk
        for kind, part in zip("ch", taken, strict=True)
        for chunk in _chunks(kind, part.sequences, config.settled_chunk_samples)
    ]
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk.name.encode() + chunk.tokens.tobytes())
    of_texts = zip(texts, *(part.counts for part in taken), strict=True)
    shares = tuple(TextShare(text.source, text.commit, *counts) for text, *counts in of_texts)
    return TokenChunks(tuple(chunks), digest.hexdigest(), len(of_text.leading), shares, tuple(notes))


def chunk_tokens(config: CalibrationConfig) -> dict[str, int]:
    """Return the number of tokens of each chunk that a configuration asks for, by name, without reading any text."""
    sizes, size = {}, config.settled_chunk_samples
    for kind, count in (("c", config.most_samples), ("h", config.most_holdout_samples)):
        for number, start in enumerate(range(0, count, size)):
            sizes[chunk_name(number, held_out=kind == "h")] = min(size, count - start) * config.longest_sequence
    return sizes


def _demands(config: CalibrationConfig) -> tuple[Demand, Demand]:
    """Return what is asked for to calibrate on, and what is held out."""
    length, is_auto = config.longest_sequence, config.holdout_samples == "auto"
    return (
        Demand("samples", config.most_samples, _LEAST_SAMPLES, config.samples == "auto", "three quarters", length),
        Demand("holdout_samples", config.most_holdout_samples, 1, is_auto, "a quarter", length),
    )


def _split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Return the documents to calibrate on, and those that are held out."""
    if len(documents) >= _HOLDOUT_EVERY:
        rest = [text for i, text in enumerate(documents) if i % _HOLDOUT_EVERY != _HOLDOUT_EVERY - 1]
        return rest, list(documents[_HOLDOUT_EVERY - 1 :: _HOLDOUT_EVERY])
    cuts = [len(document.text) * (_HOLDOUT_EVERY - 1) // _HOLDOUT_EVERY for document in documents]
    cut = list(zip(documents, cuts, strict=True))
    return (
        [dataclasses.replace(document, text=document.text[:place]) for document, place in cut],
        [dataclasses.replace(document, text=document.text[place:]) for document, place in cut],
    )


def _enough(documents: list[Document], num_tokens: int, seed: int) -> list[Document]:
    """Choose the documents to tokenize: all, or a random part of a large text, still much more than is needed."""
    limit = _CHARACTERS_PER_TOKEN_WANTED * num_tokens
    if len(documents) < 2 or sum(len(document.text) for document in documents) <= limit:
        return documents
    chosen, size = [], 0
    for index in random.Random(seed).sample(range(len(documents)), len(documents)):
        if size < limit:
            chosen.append(index)
            size += len(documents[index].text)
    return [documents[index] for index in sorted(chosen)]


def _take(
    demand: Demand,
    texts: Sequence[CalibrationText],
    parts: Sequence[list[Document]],
    tokenizer: TextTokenizer,
    seed: int,
) -> _Taken:
    """Take the sequences that are asked for from the parts of all texts that are for them."""
    shares = [text.source.share for text in texts]
    tokens = []
    for documents, count in zip(parts, apportion(demand.count, shares), strict=True):
        enough = _enough(documents, count * demand.length, seed) if count else []
        tokens.append(tokenizer.tokens_of(enough))
    body = demand.length - len(tokenizer.leading)
    available = [len(of_one) // body for of_one in tokens]
    counts = settle(demand, [text.source.source for text in texts], shares, available)
    rows = [
        [*tokenizer.leading, *of_one[i * body : (i + 1) * body]]
        for of_one, num, count in zip(tokens, available, counts, strict=True)
        for i in sorted(random.Random(seed).sample(range(num), count))
    ]
    if len(texts) > 1:  # so that chunks are alike
        rows = random.Random(seed).sample(rows, len(rows))
    return _Taken(np.array(rows, dtype=np.int64).reshape(len(rows), demand.length), counts)


def _chunks(prefix: str, sequences: Tokens, size: int) -> list[Chunk]:
    return [
        Chunk(chunk_name(index, held_out=prefix == "h"), sequences[start : start + size])
        for index, start in enumerate(range(0, len(sequences), size))
    ]
