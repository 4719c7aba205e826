"""References to a checkpoint's own code in its config."""

from typing import Any

__all__ = ["without_model_code"]

_MODEL_ENTRIES = ("AutoConfig", "AutoModel")
"""Beginnings of the names of `auto_map` entries that replace a model's class, unlike those of tokenizers."""


def without_model_code(content: dict[str, Any]) -> dict[str, Any]:
    """Return a config that asks for transformers' own class of the model: the class that the result was made with.

    Entries for tokenizers and processors stay, because no class of transformers takes their place.

    Args:
        content: Content of config.json, or of a config within it.
    """
    result = {key: without_model_code(value) if isinstance(value, dict) else value for key, value in content.items()}
    entries = result.pop("auto_map", None)
    if isinstance(entries, dict):
        others = {name: value for name, value in entries.items() if not name.startswith(_MODEL_ENTRIES)}
        result |= {"auto_map": others} if others else {}
    return result
