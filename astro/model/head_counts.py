"""How many heads of attention a model has, as its config says."""

import dataclasses
from typing import Any

__all__ = ["HeadCounts", "head_counts"]

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
"""What configs call the number of attention heads."""
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads")
"""What configs call the number of heads of keys and values, where several attention heads share one."""


@dataclasses.dataclass(frozen=True)
class HeadCounts:
    """The heads of a model. Where blocks differ, a count for each kind of block.

    Attributes:
        attention: Numbers of attention heads, ascending; empty where the config does not say.
        key_value: Numbers of heads of keys and values, ascending; empty where attention heads do not share them.
    """

    attention: tuple[int, ...] = ()
    key_value: tuple[int, ...] = ()

    @property
    def in_words(self) -> str:
        """Say the counts, such as "28 attention heads and 4 of keys and values"."""
        shared = f" and {_listed(self.key_value)} of keys and values" if self.key_value else ""
        return f"{_listed(self.attention)} attention heads{shared}"


def head_counts(config: Any) -> HeadCounts:
    """Read the numbers of heads.

    Args:
        config: Config of the language model, as transformers loads it.
    """
    attention = next((counts for name in _HEADS if (counts := _counts(config, name))), set())
    key_value = set().union(*(_counts(config, name) for name in _KEY_VALUE_HEADS))
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        key_value = {1}
    if key_value == attention:
        key_value = set()
    return HeadCounts(tuple(sorted(attention)), tuple(sorted(key_value)))


def _counts(config: Any, name: str) -> set[int]:
    """Return the distinct numbers that a key has: one, or one for each block, some of which may have no attention."""
    value = getattr(config, name, None)
    return {int(count) for count in (value if isinstance(value, list | tuple) else [value]) if count}


def _listed(counts: tuple[int, ...]) -> str:
    return " or ".join(map(str, counts))
