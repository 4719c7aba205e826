"""Nothing that a model wrote is lost on a terminal."""

import doctest

import pytest

from astro_dist.evaluation import visible_text
from astro_dist.evaluation.visible_text import note_on_blanks, visible


def test_example():
    assert doctest.testmod(visible_text).failed == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\tü 語 �", "two\nlines\tü 語 �"),
        ("\x1b[2J\r", "\\x1b[2J\\r"),  # would clear the terminal
        ("a\u202eb", "a\\u202eb"),  # would turn the line around
    ],
)
def test_only_what_cannot_be_seen_is_escaped(text, shown):
    assert visible(text) == shown


def test_text_of_blanks_is_described():
    assert note_on_blanks(" \n\n", 3) == "(nothing to see: 3 tokens that are ' \\n\\n')"
    assert note_on_blanks("", 0) == "(nothing: the text ends here)"
    assert note_on_blanks(" a ", 2) == ""
