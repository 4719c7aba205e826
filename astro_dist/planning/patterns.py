"""The patterns that a user writes for layers: which names they mean, and an answer to those that mean none."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from astro.errors import ConfigError

__all__ = ["matches", "needless_patterns", "require_matching"]

_REGEX = "re:"
"""Mark of a regular expression in the `ignore` lists of other tools."""


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a name matches one of several shell patterns.

    Args:
        name: Name of a layer.
        patterns: Shell patterns.
    """
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def require_matching(option: str, patterns: Iterable[str], layers: Sequence[str]) -> None:
    """Refuse patterns that match no layer: a typing error would otherwise go unnoticed.

    Args:
        option: Key of the configuration that holds the patterns.
        patterns: Shell patterns.
        layers: Names of all linear layers of the blocks.

    Raises:
        ConfigError: A pattern matches no layer, or is a regular expression.
    """
    for pattern in patterns:
        if pattern.startswith(_REGEX):
            shell = pattern.removeprefix(_REGEX).removeprefix("^").removesuffix("$").replace(".*", "*")
            raise ConfigError(
                f"{option}: {pattern!r} is a regular expression, expected a shell pattern, such as "
                f"{shell.replace(chr(92), '')!r}; a layer is called {layers[-1]}"
            )
        if not _means_any(pattern, layers):
            raise ConfigError(f"{option}: {pattern!r} matches no linear layer of the blocks, e.g. {layers[-1]}")


def needless_patterns(patterns: Iterable[str], layers: Sequence[str], others: Iterable[str]) -> tuple[str, ...]:
    """Return the patterns for layers that stay as they are whatever the user says, such as lm_head and routers.

    Args:
        patterns: Shell patterns.
        layers: Names of all linear layers of the blocks, which are the layers that can be quantized.
        others: Names of all other modules.
    """
    others = list(others)
    return tuple(p for p in patterns if not _means_any(p, layers) and _means_any(p, others))


def _means_any(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)
