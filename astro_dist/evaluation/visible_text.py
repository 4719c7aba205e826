"""What models wrote, so that a person at a terminal sees all of it: also what prints as nothing."""

__all__ = ["note_on_blanks", "visible"]

_LAYOUT = "\n\t "


def visible(text: str) -> str:
    r"""Write characters that a terminal does not show as escapes; line ends, tabs and spaces stay as they are.

    Args:
        text: The text.

    >>> visible("a\x00\u200bb")
    'a\\x00\\u200bb'
    """
    return "".join(c if c.isprintable() or c in _LAYOUT else c.encode("unicode_escape").decode() for c in text)


def note_on_blanks(text: str, num_tokens: int) -> str:
    """Say what a text is of which nothing can be seen; empty where something can.

    Args:
        text: The text.
        num_tokens: Number of tokens that it was written with, without the one that ended it.
    """
    if text.strip():
        return ""
    if not num_tokens:
        return "(nothing: the text ends here)"
    return f"(nothing to see: {num_tokens} tokens that are {text!a})"
