"""Make tokens of documents: what is text stays text, whatever it looks like."""

import array
import re
from collections.abc import Sequence
from typing import Any

from astro.errors import CheckpointError
from astro_dist.source.documents import Document
from astro_dist.source.long_wait import LongWait
from astro_dist.source.sampling import cut_text

__all__ = ["TextTokenizer", "leading_tokens", "require_known"]

_PIECE_CHARACTERS = 1 << 18
"""Characters that are tokenized together: a tokenizer needs a hundred bytes of memory for each."""


class TextTokenizer:
    """Makes tokens of documents with the tokenizer of a model.

    A plain text that holds the name of a special token, such as `<|im_end|>`, is read as these characters, and counted.
    A chat that the tokenizer's template has rendered holds special tokens that are meant as such. What the template
    writes in front of it is left out where it is what every sequence begins with anyway.

    Attributes:
        leading: Tokens that the tokenizer puts in front of every text: BOS, or several, as GLM's do, or none.
        num_lookalikes: Number of places where a plain text held the name of a special token.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Find out what the tokenizer puts in front of a text, and which of its tokens are special.

        Args:
            tokenizer: Tokenizer of the model, as transformers loads it.

        Raises:
            CheckpointError: The tokenizer changes the tokens of a text where it puts others in front.
        """
        self._tokenizer = tokenizer
        self.leading = leading_tokens(tokenizer)
        self.num_lookalikes = 0
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {number: str(token) for number, token in added.items() if token.special}
        unknown = getattr(tokenizer, "unk_token_id", None)
        self._special_ids = special.keys() - {unknown}
        names = sorted(filter(None, special.values()), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names))) if names else None

    def tokens_of(self, documents: Sequence[Document], wait: LongWait | None = None) -> "array.array[int]":
        """Return the tokens of all documents, one after the other.

        Args:
            documents: Documents.
            wait: What says how far it is, in millions of characters; None for documents that are a calibration text.
        """
        tokens = array.array("q")
        if wait is None:
            size = sum(len(document.text) for document in documents)
            wait = LongWait("calibration text: tokenized", size / 1e6, "million characters")
        for document in documents:
            for index, piece in enumerate(cut_text(document.text, _PIECE_CHARACTERS)):
                tokens.extend(self._chat_tokens(piece, index == 0) if document.is_chat else self._encode_plain(piece))
                wait.advanced(len(piece) / 1e6)
        return tokens

    def _chat_tokens(self, piece: str, is_first: bool) -> list[int]:
        """Return the tokens of a piece of a chat, without what every sequence begins with anyway."""
        tokens, num_leading = self._encode(piece), len(self.leading)
        return tokens[num_leading:] if is_first and tokens[:num_leading] == self.leading else tokens

    def _encode(self, text: str, **options: Any) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])

    def _encode_plain(self, text: str) -> list[int]:
        """Return the tokens of a text in which nothing is meant as a special token."""
        lookalikes = list(self._names.finditer(text)) if self._names else []
        if not lookalikes:
            return self._encode(text)
        self.num_lookalikes += len(lookalikes)
        tokens = self._encode(text, split_special_tokens=True)
        if self._special_ids.isdisjoint(tokens):
            return tokens
        # Some tokenizers do not heed that option, others have the name in the vocabulary of texts: cut the names apart.
        cuts = [0, *(match.start() + 1 for match in lookalikes), len(text)]
        return [token for i, cut in enumerate(cuts[1:]) for token in self._encode(text[cuts[i] : cut])]


def leading_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts in front of every text: BOS, or several, or none.

    Args:
        tokenizer: Tokenizer of the model, as transformers loads it.

    Raises:
        CheckpointError: The tokenizer changes the tokens of a text where it puts others in front.
    """
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    text = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    start = next((start for start in range(len(whole)) if whole[start : start + len(text)] == text), None)
    if start is None or not text:
        raise CheckpointError(
            f"its tokenizer makes {text} of the text 'a' alone, and {whole} with the tokens that belong around it, so "
            "that nothing tells which of these come first; give the model's own tokenizer"
        )
    return whole[:start]


def require_known(largest: int, vocab_size: int, name: object) -> None:
    """Refuse tokens that a model does not have.

    Args:
        largest: Largest of the tokens.
        vocab_size: Number of tokens that the model has.
        name: What the message calls the model.

    Raises:
        CheckpointError: The token is too large.
    """
    if largest >= vocab_size:
        raise CheckpointError(
            f"{name}: its tokenizer gives token {largest}, but the model has a vocabulary of {vocab_size}; tokenizer "
            "and config.json are of different models"
        )
