"""What each key of a configuration means. The docstrings of the keys are the only place where that is written."""

import ast
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from astro.errors import ConfigError
from astro_dist.config.keys import fields_of, section_suggestion, suggestion
from astro_dist.config.schema import RunConfig
from astro_dist.config.training import TrainConfig

__all__ = ["commented_defaults", "commented_yaml", "explain", "json_schema", "starting_yaml"]

_WIDTH = 100
"""Length of a line of comments, in characters."""
_STARTING = {
    "model": ["source"],
    "quantization": ["bits", "group_size", "indivisible", "format"],
    "calibration": ["source", "samples", "sequence_length", "holdout_samples", "token_weights"],
    "execution": ["mode", "rounds"],
    "output": ["dir"],
}
"""Keys that a new configuration shows."""
_EXAMPLES: dict[type[BaseModel], dict[str, dict[str, Any]]] = {
    RunConfig: {"model": {"source": "ORG/NAME"}, "output": {"dir": "runs/my-run"}},
    TrainConfig: {
        "model": {"source": "ORG/NAME"},
        "optimization": {"steps": 10000},
        "output": {"dir": "runs/my-training"},
    },
}
"""Values of the keys that have no default, by class of the configuration."""
_SENTENCE = re.compile(r"(?<=[.])\s(?=[A-Z`])")


_KINDS = {
    int: "a whole number", float: "a number", tuple: "a list", dict: "a mapping", Path: "a path",
}  # fmt: skip
_REQUIRED = object()


def explain(key: str, schema: type[BaseModel] = RunConfig) -> str:
    """Explain a key of a configuration, or a section with all its keys.

    Args:
        key: Path of the key, such as `quantization.bits`, or name of a section.
        schema: Class of the configuration.

    Raises:
        ConfigError: There is no such key.
    """
    section, _, name = key.partition(".")
    sections = fields_of(schema)
    if section not in sections:
        raise ConfigError(f"no section {section!r}{section_suggestion(schema, section)}")
    keys, docs = fields_of(sections[section]), _docs(sections[section])
    if not name:
        lines = [f"{section}: {_docs(schema)[section]}", ""]
        return "\n".join([*lines, *(f"{section}.{name}: {_summary(docs[name])}" for name in keys)])
    if name not in keys:
        raise ConfigError(f"{section} has no key {name!r}{suggestion(name, keys)}")
    default = _defaults(schema)[section].get(name, _REQUIRED)
    shown = "it must be given" if default is _REQUIRED else f"default {_inline(default)}"
    return f"{key} ({_in_words(keys[name])}; {shown})\n{textwrap.fill(docs[name], _WIDTH)}"


def commented_yaml(
    content: Mapping[str, Mapping[str, Any]], title: Iterable[str] = (), schema: type[BaseModel] = RunConfig
) -> str:
    """Write a configuration as YAML with a comment above each key.

    Args:
        content: Values of keys by section; only these are written.
        title: Lines of a comment at the top.
        schema: Class of the configuration.
    """
    lines = [f"# {line}" for line in title]
    sections = fields_of(schema)
    for section, values in content.items():
        docs = _docs(sections[section])
        lines.append(f"{section}:")
        for key, value in values.items():
            text = f"{_summary(docs[key])}{_open_choices(fields_of(sections[section])[key], docs[key])}"
            comment = textwrap.wrap(text, _WIDTH, initial_indent="  # ", subsequent_indent="  # ")
            lines += [*comment, f"  {key}:{'' if value is None else f' {_inline(value)}'}"]
    return "\n".join([*lines, ""])


def commented_defaults(schema: type[BaseModel] = RunConfig) -> str:
    """Write every key with its default as YAML, with a comment above each.

    Args:
        schema: Class of the configuration.
    """
    return commented_yaml(_plain(schema.model_validate(_EXAMPLES[schema])), schema=schema)


def starting_yaml(config: RunConfig) -> str:
    """Write the keys of a configuration that most runs set, as YAML with a comment above each.

    Args:
        config: Configuration of a run.
    """
    content = config.plain()
    chosen = {section: {key: content[section][key] for key in keys} for section, keys in _STARTING.items()}
    title = ("A run of astro-dist: `astro-dist quantize` and this file.", "`astro-dist config` prints all other keys.")
    return commented_yaml(chosen, title)


def json_schema(schema: type[BaseModel] = RunConfig) -> dict[str, Any]:
    """Return the JSON schema of a configuration, each key with its explanation.

    Args:
        schema: Class of the configuration.
    """
    content = schema.model_json_schema()
    classes = [schema, *fields_of(schema).values()]
    for kind in classes:
        place = content if kind is schema else content["$defs"][kind.__name__]
        for name, doc in _docs(kind).items():
            place["properties"][name]["description"] = doc
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A run of astro-dist"} | content


@cache
def _docs(kind: type) -> dict[str, str]:
    """The docstrings of a section's keys by name, those of its base classes too."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if "__annotations__" not in vars(base) or not base.__module__.startswith("astro"):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, doc in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                docs[ast.unparse(field.target)] = inspect.cleandoc(str(doc.value.value)).replace("\n", " ")
    return {name: docs[name] for name in fields_of(kind)}


@cache
def _defaults(schema: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """The default of every key that has one, by section."""
    content = _plain(schema.model_validate(_EXAMPLES[schema]))
    for section, values in _EXAMPLES[schema].items():
        for key in values:
            del content[section][key]
    return content


def _plain(config: Any) -> dict[str, dict[str, Any]]:
    plain: dict[str, dict[str, Any]] = config.plain()
    return plain


def _summary(doc: str) -> str:
    """The first sentence of a docstring."""
    return _SENTENCE.split(doc, maxsplit=1)[0]


def _inline(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1 << 20).removesuffix("\n").removesuffix("\n...")


def _in_words(kind: Any) -> str:
    """The values that a key can have."""
    *others, last = [word for part in _kinds(kind) for word in _values(part)]
    return " or ".join(filter(None, (", ".join(others), last)))


def _open_choices(kind: Any, doc: str) -> str:
    """The values to choose from in brackets, where the first sentence does not name them all."""
    choices = [word for part in _kinds(kind) if typing.get_origin(part) is typing.Literal for word in _values(part)]
    summary = _summary(doc)
    is_named = all(re.search(rf"\b{choice}\b" if choice.isdigit() else f"`{choice}`", summary) for choice in choices)
    return "" if is_named else f" ({_in_words(kind)})"


def _kinds(kind: Any) -> list[Any]:
    """The types of a union without the limits that they are annotated with, or the only type."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return [typing.get_args(part)[0] if typing.get_origin(part) is typing.Annotated else part for part in parts]


def _values(kind: Any) -> list[str]:
    if typing.get_origin(kind) is typing.Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    if kind is bool:
        return ["true", "false"]
    if kind is type(None):
        return ["nothing"]
    return [_KINDS.get(typing.get_origin(kind) or kind, "text")]
