"""The text that a perplexity is measured on, cut into windows of tokens as the papers of GPTQ and its followers do.

Documents are joined by an empty line, tokenized once, and cut into windows of one length; what is left behind the last
window is not used. Their figures for WikiText-2 come from its test split with every row, the empty ones too, and
windows of 2048 tokens. What their tokenizer puts in front stands in front of the text, once. Some models, such as
Gemma, predict nothing of use without it: for them it can stand in front of every window.
"""

import array
import dataclasses
from collections.abc import Iterable, Iterator

import torch
import transformers

from astro.errors import ConfigError
from astro_dist.source.long_wait import LongWait
from astro_dist.source.sampling import cut_text
from astro_dist.source.text_tokens import leading_tokens

__all__ = ["TextWindows", "WindowCut", "cut_windows"]

_JOINT = "\n\n"
_PIECE_CHARACTERS = 1 << 22
"""Characters that are tokenized together: more than any text of the papers has, and little enough for memory."""


@dataclasses.dataclass(frozen=True)
class WindowCut:
    """How a text is cut.

    Attributes:
        length: Number of tokens of a window.
        limit: Largest number of windows, taken from the beginning; None for all.
        leads_each: Whether the tokens that the tokenizer puts in front of a text stand in front of every window.
    """

    length: int
    limit: int | None = None
    leads_each: bool = False


@dataclasses.dataclass(frozen=True)
class TextWindows:
    """Windows of a text.

    Attributes:
        source: Where the text is from, in words.
        input_ids: Tokens of the windows, int64 [N, T].
        unused_tokens: Number of tokens behind the last window; None where the text was not read to its end.
        num_leading: Number of tokens in front of every window that are no text, and whose predictions do not count.
    """

    source: str
    input_ids: torch.Tensor
    unused_tokens: int | None
    num_leading: int = 0


def cut_windows(
    source: str, rows: Iterable[str], tokenizer: transformers.PreTrainedTokenizerBase, cut: WindowCut
) -> TextWindows:
    """Tokenize a text once and cut it into windows. With a limit, no more of a long text is read than is needed.

    Args:
        source: Where the text is from, in words.
        rows: The documents.
        tokenizer: Tokenizer of the model, which may put its first tokens in front of the text.
        cut: How it is cut.

    Raises:
        ConfigError: The text has too few tokens for a window, or a window no room for text.
        CheckpointError: The tokenizer changes the tokens of a text where it puts others in front.
    """
    leading = leading_tokens(tokenizer) if cut.leads_each else []
    body = cut.length - len(leading)
    if body < 1:
        raise ConfigError(
            f"--window {cut.length}: has no room for text, the tokenizer begins every text with {len(leading)} tokens"
        )
    needed = None if cut.limit is None else cut.limit * body
    tokens, is_whole, done = array.array("q"), True, 0
    wait = LongWait(f"--text {source}: tokenized", None, "million characters")
    for number, piece in enumerate(_pieces(rows)):
        if needed is not None and len(tokens) >= needed:
            is_whole = False
            break
        is_first = number == 0 and not cut.leads_each
        tokens.extend(tokenizer(piece, add_special_tokens=is_first, verbose=False)["input_ids"])
        done += len(piece)
        wait.reached(done / 1e6)
    count = len(tokens) // body
    if not count:
        raise ConfigError(
            f"--text {source}: has {len(tokens)} tokens, expected at least one window of {body}; use more text, or "
            "shorter windows with --window"
        )
    count = min(count, cut.limit or count)
    text = torch.tensor(tokens[: count * body], dtype=torch.int64).view(count, body)
    in_front = torch.tensor(leading, dtype=torch.int64).expand(count, -1)
    unused = len(tokens) - count * body if is_whole else None
    return TextWindows(source, torch.cat((in_front, text), dim=1), unused, len(leading))


def _pieces(rows: Iterable[str]) -> Iterator[str]:
    """Join documents, and cut them only where they are longer than any text of the papers."""
    waiting: list[str] = []
    size = 0
    for number, row in enumerate(rows):
        waiting += [_JOINT, row] if number else [row]
        size += len(row) + len(_JOINT)
        if size > _PIECE_CHARACTERS:
            *whole, last = cut_text("".join(waiting), _PIECE_CHARACTERS)
            yield from whole
            waiting, size = [last], len(last)
    if waiting:
        yield "".join(waiting)
