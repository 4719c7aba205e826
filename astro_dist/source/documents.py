"""Read the documents of one calibration text, wherever it is."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from astro.errors import ConfigError
from astro_dist.config.schema import TextSource
from astro_dist.config.text_place import FILE_SUFFIXES, PYTHON_DOCS, is_dataset, is_file, name_elsewhere
from astro_dist.source.chats import ChatRenderer
from astro_dist.source.rows import Rows
from astro_dist.source.text_files import read_file

__all__ = ["CalibrationText", "Document", "Wanted", "read_text"]


@dataclasses.dataclass(frozen=True)
class Document:
    """A document is what was written in one piece: a text, or a chat after rendering.

    Attributes:
        text: Text of the document.
        is_chat: Whether the tokenizer's chat template has rendered it, so that special tokens in it are meant as such.
    """

    text: str
    is_chat: bool = False


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is wanted of a text.

    Attributes:
        num_characters: Number of characters above which a sample is enough.
        seed: Seed of the sample.
        commit: Commit of the dataset's repository that the run was begun with; None for a new run.
    """

    num_characters: int
    seed: int
    commit: str | None = None


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """A calibration text is what was read from one source.

    Attributes:
        source: Place of the text, as the configuration names it, and its share.
        documents: Documents, none of them blank.
        notes: Sentences that the user should read.
        commit: Commit of the dataset's repository on the Hub; None for other sources.
    """

    source: TextSource
    documents: tuple[Document, ...]
    notes: tuple[str, ...] = ()
    commit: str | None = None


def read_text(source: TextSource, wanted: Wanted, tokenizer: Any) -> CalibrationText:
    """Read the documents of a text; of a large one a sample, many times as much as the run needs.

    Args:
        source: Place of the text.
        wanted: How much of it is enough.
        tokenizer: Tokenizer of the model, whose template renders chats.

    Raises:
        ConfigError: The source is unknown, cannot be read, or holds no text.
    """
    commit = None
    if is_dataset(source.source):
        from astro_dist.source.hub_dataset import read_dataset  # slow to import, and mostly not needed

        rows, commit, notes = read_dataset(source, wanted.num_characters, wanted.seed, wanted.commit)
    else:
        rows, notes = _read_here(source, wanted), []
    documents = tuple(_documents(rows, source.source, tokenizer, notes))
    if not documents:
        raise ConfigError(f"calibration.source {source.source}: holds no text")
    return CalibrationText(source, documents, tuple(notes), commit)


def _read_here(source: TextSource, wanted: Wanted) -> Rows:
    """Read a text that is on this machine."""
    of_datasets = {"subset": source.subset is not None, "split": source.split != "train"}
    of_datasets["revision"] = source.revision is not None
    for key, is_set in of_datasets.items():
        if is_set:
            raise ConfigError(f"calibration.{key}: only a dataset on the Hub has one, {source.source} is none")
    if source.source == PYTHON_DOCS:
        from pydoc_data import topics  # 465,000 characters that ship with CPython; not needed otherwise

        return Rows([text for _, text in sorted(topics.topics.items())])
    if not is_file(source.source):
        raise ConfigError(
            f"calibration.source {source.source}: expected python-docs, a file (*{', *'.join(FILE_SUFFIXES)}), or a "
            "dataset on the Hub (ORG/NAME)"
        )
    return read_file(Path(source.source).expanduser(), source.column, wanted.num_characters, wanted.seed)


def _documents(rows: Rows, name: str, tokenizer: Any, notes: list[str]) -> Iterator[Document]:
    """Yield what is not blank, chats as the tokenizer's template renders them, and say so in the notes."""
    for row in rows.rows:
        if isinstance(row, str) and row.strip():
            yield Document(row)
    chats = [row for row in rows.rows if not isinstance(row, str)]
    if not chats:
        return
    renderer = ChatRenderer(tokenizer, name, rows.column)
    rendered = list(filter(None, map(renderer.render, chats)))
    if not rendered:
        raise ConfigError(
            f"calibration.source {name}: the model's chat template refuses every chat of column {rows.column!r}, the "
            f"first with {renderer.reason}; choose another column or text"
        )
    yield from (Document(text, is_chat=True) for text in rendered)
    name = name_elsewhere(name)  # the card of the model shows notes
    notes.append(
        f"calibration text {name}: column {rows.column!r} holds chats, which the model's chat template renders"
    )
    if renderer.refused:
        notes.append(
            f"calibration text {name}: {renderer.refused} of {len(chats)} chats are left out, because the model's chat "
            f"template refuses them, the first with {renderer.reason}"
        )
