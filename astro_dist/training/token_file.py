"""The tokens of a training in one file, from which every worker reads the sequences of a step.

Documents follow each other with the tokenizer's end-of-text token between them. The order of the sequences is drawn
anew for each pass over the text. It follows from the seed and the number of the step alone, so that training goes on
with the sequences that come next, whatever the number of workers.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from astro.errors import ConfigError
from astro.storage.atomic import read_json, write_atomic, write_json
from astro_dist.config.training import TrainTextConfig
from astro_dist.source.documents import Document
from astro_dist.source.long_wait import LongWait
from astro_dist.source.text_tokens import TextTokenizer, require_known
from astro_dist.source.whole_text import read_rows

__all__ = ["TokenFile", "write_tokens"]

_DTYPE = np.dtype("<u4")


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """The tokens of a training.

    Attributes:
        path: Path of the file: unsigned integers of 32 bits, one after the other.
        num_tokens: Number of tokens.
        length: Number of tokens of a sequence.
    """

    path: Path
    num_tokens: int
    length: int

    @property
    def num_sequences(self) -> int:
        """Number of whole sequences."""
        return self.num_tokens // self.length

    def sequences(self, first: int, count: int, seed: int) -> torch.Tensor:
        """Return sequences of the training, int64 [count, T].

        Args:
            first: Number of the first sequence, counted from the begin of the training over all passes.
            count: Number of sequences.
            seed: Seed of their order.
        """
        tokens: npt.NDArray[np.uint32] = np.memmap(self.path, dtype=_DTYPE, mode="r")
        rows = []
        for number in range(first, first + count):
            index = _index_of(number, self.num_sequences, seed)
            rows.append(tokens[index * self.length : (index + 1) * self.length].astype(np.int64))
        return torch.from_numpy(np.stack(rows))


def write_tokens(config: TrainTextConfig, tokenizer: Any, vocab_size: int, path: Path) -> TokenFile:
    """Make tokens of a text, or take the file that is there already.

    Args:
        config: Section of the configuration.
        tokenizer: Tokenizer of the model, as transformers loads it.
        vocab_size: Number of tokens that the model has.
        path: Path of the file of tokens; what it holds is recorded in a .json file beside it.

    Raises:
        ConfigError: The text cannot be read, or is shorter than one sequence.
        CheckpointError: The tokenizer gives tokens that the model does not have.
        StorageError: The file cannot be written.
    """
    info = path.with_suffix(".json")
    if info.is_file() and path.is_file():
        content = read_json(info)
        return TokenFile(path, content["num_tokens"], config.sequence_length)
    of_text = TextTokenizer(tokenizer)
    end = getattr(tokenizer, "eos_token_id", None)
    digest, count, largest = hashlib.sha256(), 0, 0
    wait = LongWait(f"text.source {config.source}: tokenized", None, "million characters")

    def write(partial: Path) -> None:
        nonlocal count, largest
        with partial.open("wb") as file:
            for text in _documents(config):
                ids = of_text.tokens_of([Document(text)], wait)
                tokens = np.array([*ids, *([] if end is None else [end])], dtype=_DTYPE)
                raw = tokens.tobytes()
                digest.update(raw)
                file.write(raw)
                count += len(tokens)
                largest = max(largest, int(tokens.max(initial=0)))

    write_atomic(path, write)
    require_known(largest, vocab_size, "model.source")
    if count < config.sequence_length:
        raise ConfigError(
            f"text.source {config.source}: has {count} tokens, expected at least one sequence of "
            f"{config.sequence_length}; use more text, or a smaller text.sequence_length"
        )
    write_json(info, {"num_tokens": count, "sha256": digest.hexdigest()})
    return TokenFile(path, count, config.sequence_length)


def _documents(config: TrainTextConfig) -> Iterator[str]:
    """Yield the documents of a text in their order, without empty ones."""
    rows = read_rows(config.text_source, "text.source")
    return (row for row in rows if row)


def _index_of(number: int, num_sequences: int, seed: int) -> int:
    """Return which sequence of the file is at a place of the training."""
    passed, rest = divmod(number, num_sequences)
    return int(_order(passed, num_sequences, seed)[rest])


_orders: dict[tuple[int, int, int], npt.NDArray[np.int64]] = {}


def _order(passed: int, num_sequences: int, seed: int) -> npt.NDArray[np.int64]:
    key = (passed, num_sequences, seed)
    if key not in _orders:
        _orders.clear()
        _orders[key] = np.random.default_rng([seed, passed]).permutation(num_sequences)
    return _orders[key]
