"""Texts are cut into windows as in the papers, without all of a long text in a tokenizer's memory."""

import itertools

import pytest
import tokenizers
import torch

from astro.errors import ConfigError
from astro_dist.evaluation import text_windows
from astro_dist.evaluation.text_windows import WindowCut, cut_windows
from tests.support.models import byte_tokenizer


@pytest.fixture
def tokenizer():
    """A tokenizer that puts two tokens in front of a text, and one behind it."""
    made = byte_tokenizer()
    made.add_special_tokens({"bos_token": "<b>", "additional_special_tokens": ["<c>"]})
    ids = made.convert_tokens_to_ids(["<b>", "<c>"])
    made.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<b> <c> $A <b>", special_tokens=list(zip(["<b>", "<c>"], ids, strict=True))
    )
    return made


def test_leading_tokens_stand_once_in_front_of_the_text_or_of_every_window(tokenizer):
    leading = tokenizer.convert_tokens_to_ids(["<b>", "<c>"])
    once = cut_windows("x", ["a" * 30], tokenizer, WindowCut(10))
    assert [row[:2] == leading for row in once.input_ids.tolist()] == [True, False, False]
    each = cut_windows("x", ["a" * 30], tokenizer, WindowCut(10, leads_each=True))
    assert [row[:2] == leading for row in each.input_ids.tolist()] == [True, True, True]
    assert (once.num_leading, each.num_leading, each.unused_tokens) == (0, 2, 6)
    with pytest.raises(ConfigError, match="--window 2: has no room for text"):
        cut_windows("x", ["a"], tokenizer, WindowCut(2, leads_each=True))


def test_a_long_text_is_tokenized_in_pieces(monkeypatch):
    tokenizer, lengths = byte_tokenizer(), []
    rows = [f"line {number} of a text\n" * 3 for number in range(50)]
    whole = cut_windows("x", rows, tokenizer, WindowCut(16))
    monkeypatch.setattr(text_windows, "_PIECE_CHARACTERS", 100)
    real = tokenizer._encode_plus
    monkeypatch.setattr(tokenizer, "_encode_plus", lambda text, **keys: lengths.append(len(text)) or real(text, **keys))
    in_pieces = cut_windows("x", rows, tokenizer, WindowCut(16))
    assert torch.equal(in_pieces.input_ids, whole.input_ids)
    assert in_pieces.unused_tokens == whole.unused_tokens
    assert max(lengths) <= 100


def test_with_a_limit_no_more_is_read_than_is_needed(monkeypatch):
    monkeypatch.setattr(text_windows, "_PIECE_CHARACTERS", 100)
    endless = (f"row {number}" for number in itertools.count())
    text = cut_windows("x", endless, byte_tokenizer(), WindowCut(16, limit=8))
    assert (text.input_ids.shape, text.unused_tokens) == ((8, 16), None)
