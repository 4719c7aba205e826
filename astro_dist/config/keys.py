"""The sections and keys of a configuration, found by their names."""

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from functools import cache
from typing import Any

from pydantic import BaseModel

__all__ = ["fields_of", "section_suggestion", "suggestion", "type_at"]


@cache
def fields_of(kind: Any) -> dict[str, Any]:
    """Return the types of a section's keys by name, in the order in which they are shown; none for what is no section.

    Args:
        kind: Class of the section.
    """
    if not dataclasses.is_dataclass(kind):
        return {name: field.annotation for name, field in getattr(kind, "model_fields", {}).items()}
    types = typing.get_type_hints(kind)
    # What is asked for comes before how it is computed; a base class would have its fields first.
    names = sorted((field.name for field in dataclasses.fields(kind)), key=lambda name: name not in _of_class(kind))
    return {name: types[name] for name in names}


def type_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> Any:
    """Return the type of the value at a place of a configuration; None where there is no such place.

    Args:
        schema: Class of the whole configuration.
        location: Names of section and keys, from the outside in.
    """
    kind: Any = schema
    for part in location:
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if origin is dict:
            kind = inner[1]
        else:
            kind = inner[0] if isinstance(part, int) and inner else fields_of(kind).get(str(part))
    return kind


def suggestion(name: str, names: Iterable[str]) -> str:
    """Return the end of a sentence about a name that does not exist: a similar one, or all that exist.

    Args:
        name: Name that does not exist.
        names: All names that exist.
    """
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else f"; known here: {', '.join(names)}"


def section_suggestion(schema: type[BaseModel], name: str) -> str:
    """Return the end of a sentence about a section that does not exist: a key of that name, a similar section, or all.

    Args:
        schema: Class of the whole configuration.
        name: Name that does not exist.
    """
    sections = fields_of(schema)
    keys = [f"{section}.{name}" for section, kind in sections.items() if name in fields_of(kind)]
    return f" (did you mean {' or '.join(keys)}?)" if keys else suggestion(name, sections)


def _of_class(kind: Any) -> dict[str, Any]:
    """The annotations of a class without those of its base classes."""
    annotations: dict[str, Any] = vars(kind).get("__annotations__", {})
    return annotations
