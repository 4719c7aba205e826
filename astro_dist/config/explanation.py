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

from astro.errors import ConfigError
from astro_dist.config.keys import fields_of, section_suggestion, suggestion
from astro_dist.config.schema import RunConfig

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
_SENTENCE = re.compile(r"(?<=[.])\s(?=[A-Z`])")


_KINDS = {
    int: "a whole number", float: "a number", bool: "true or false", tuple: "a list", dict: "a mapping", Path: "a path",
}  # fmt: skip
_REQUIRED = object()


def explain(key: str) -> str:
    """Explain a key of the configuration, or a section with all its keys.

    Args:
        key: Path of the key, such as `quantization.bits`, or name of a section.

    Raises:
        ConfigError: There is no such key.
    """
    section, _, name = key.partition(".")
    sections = fields_of(RunConfig)
    if section not in sections:
        raise ConfigError(f"no section {section!r}{section_suggestion(section)}")
    keys, docs = fields_of(sections[section]), _docs(sections[section])
    if not name:
        lines = [f"{section}: {_docs(RunConfig)[section]}", ""]
        return "\n".join([*lines, *(f"{section}.{name}: {_summary(docs[name])}" for name in keys)])
    if name not in keys:
        raise ConfigError(f"{section} has no key {name!r}{suggestion(name, keys)}")
    default = _defaults()[section].get(name, _REQUIRED)
    shown = "it must be given" if default is _REQUIRED else f"default {_inline(default)}"
    return f"{key} ({_in_words(keys[name])}; {shown})\n{textwrap.fill(docs[name], _WIDTH)}"


def commented_yaml(content: Mapping[str, Mapping[str, Any]], title: Iterable[str] = ()) -> str:
    """Write a configuration as YAML with a comment above each key.

    Args:
        content: Values of keys by section; only these are written.
        title: Lines of a comment at the top.
    """
    lines = [f"# {line}" for line in title]
    sections = fields_of(RunConfig)
    for section, values in content.items():
        docs = _docs(sections[section])
        lines.append(f"{section}:")
        for key, value in values.items():
            comment = textwrap.wrap(_summary(docs[key]), _WIDTH, initial_indent="  # ", subsequent_indent="  # ")
            lines += [*comment, f"  {key}:{'' if value is None else f' {_inline(value)}'}"]
    return "\n".join([*lines, ""])


def commented_defaults() -> str:
    """Write every key with its default as YAML, with a comment above each."""
    examples = {"model": {"source": "ORG/NAME"}, "output": {"dir": "runs/my-run"}}
    return commented_yaml(RunConfig.model_validate(examples).plain())


def starting_yaml(config: RunConfig) -> str:
    """Write the keys of a configuration that most runs set, as YAML with a comment above each.

    Args:
        config: Configuration of a run.
    """
    content = config.plain()
    chosen = {section: {key: content[section][key] for key in keys} for section, keys in _STARTING.items()}
    title = ("A run of astro-dist: `astro-dist quantize` and this file.", "`astro-dist config` prints all other keys.")
    return commented_yaml(chosen, title)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration, each key with its explanation."""
    schema = RunConfig.model_json_schema()
    classes = [RunConfig, *fields_of(RunConfig).values()]
    for kind in classes:
        place = schema if kind is RunConfig else schema["$defs"][kind.__name__]
        for name, doc in _docs(kind).items():
            place["properties"][name]["description"] = doc
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A run of astro-dist"} | schema


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
def _defaults() -> dict[str, dict[str, Any]]:
    """The default of every key that has one, by section."""
    content = RunConfig.model_validate({"model": {"source": ""}, "output": {"dir": "."}}).plain()
    del content["model"]["source"], content["output"]["dir"]
    return content


def _summary(doc: str) -> str:
    """The first sentence of a docstring."""
    return _SENTENCE.split(doc, maxsplit=1)[0]


def _inline(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1 << 20).removesuffix("\n").removesuffix("\n...")


def _in_words(kind: Any) -> str:
    """The values that a key can have."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return " or ".join(word for part in parts for word in _values(part))


def _values(kind: Any) -> list[str]:
    if typing.get_origin(kind) is typing.Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    if kind is type(None):
        return ["nothing"]
    return [_KINDS.get(typing.get_origin(kind) or kind, "text")]
