"""Render chats with the chat template of a model's tokenizer."""

import datetime
from collections.abc import Mapping
from typing import Any

from astro.errors import ConfigError
from astro_dist.source.rows import Chat

__all__ = ["ChatRenderer"]

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "model": "assistant"}
"""Roles as tables with `from` and `value` call them, and what templates call them."""
_TODAY = datetime.datetime(2024, 7, 26)
"""The day that a template is told: with today's, the same run would have other tokens tomorrow."""
_DIRECTIVES = ("%a", "%A", "%b", "%B", "%d", "%-d", "%e", "%m", "%y", "%Y", "%H", "%I", "%M", "%S", "%p", "%j")
_CLOCK = "{{% macro strftime_now(format) %}}{{{{ format{} }}}}{{% endmacro %}}".format(
    "".join(f" | replace('{directive}', '{_TODAY.strftime(directive)}')" for directive in _DIRECTIVES)
)
"""Beginning of a template that asks for the time; in the rest this takes the place of the function that tells it."""


class ChatRenderer:
    """Renders chats, and counts those that the template refuses."""

    def __init__(self, tokenizer: Any, name: str, column: str | None) -> None:
        """Begin with nothing refused.

        Args:
            tokenizer: Tokenizer of the model.
            name: Name of the text in the configuration.
            column: Name of the column that holds the chats.

        Raises:
            ConfigError: The tokenizer has no chat template.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"calibration.source {name}: column {column!r} holds chats, but the model's tokenizer has no chat "
                "template to render them; choose a column of text (calibration.column), or put the template of the "
                "model's chat version (chat_template.jinja) beside its tokenizer"
            )
        self._tokenizer = tokenizer
        self.refused = 0
        self.reason = ""

    def render(self, chat: Chat) -> str | None:
        """Return a chat as the model sees it, special tokens included.

        Args:
            chat: Messages with `role` and `content`, or `from` and `value`.

        Returns:
            The text; None where the template or this function refuses the chat, which is counted.
        """
        try:
            messages = [_message(message) for message in chat]
            template = str(self._tokenizer.get_chat_template())
            if "strftime_now" in template:
                template = _CLOCK + template
            return str(self._tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
        except Exception as error:  # templates raise what they like
            self.refused += 1
            self.reason = self.reason or f"{type(error).__name__}: {error}"
            return None


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with the keys that templates know."""
    if "role" in message:
        return dict(message)
    if "from" not in message or "value" not in message:
        raise ValueError(f"a message has the keys {', '.join(message)}, expected role and content, or from and value")
    role = str(message["from"])
    return {"role": _ROLES.get(role, role), "content": message["value"]}
