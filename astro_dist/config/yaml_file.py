"""The file of a run: one YAML file is one whole run. A key that is not known is an error that names its path."""

import copy
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from astro.errors import ConfigError
from astro_dist.config.schema import PublishConfig, RunConfig

__all__ = ["load_config", "make_target"]

_MARKER = re.compile(r"int|float|bool|str|literal\[.*\]")
"""What pydantic puts into a path for the branch of a union that it tried."""
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "string": "text",
    "tuple": "a list", "dict": "a mapping", "model": "a mapping", "dataclass": "a mapping", "path": "a path",
}  # fmt: skip
"""Kinds of values by the beginning of pydantic's names for what is wrong with one."""


class _Strict(yaml.SafeLoader):
    """YAML as it is, but for a key that stands twice in one mapping: the last would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node.

        Raises:
            ConstructorError: a key stands in it twice.
        """
        found: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in found:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} is there twice", problem_mark=key_node.start_mark
                )
            found.append(key)
        return super().construct_mapping(node, deep)


def load_config(path: Path, assignments: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply `key.path=value` assignments, validate.

    Args:
        path: of the YAML file.
        assignments: each `section.key=value`, the value read as YAML.

    Raises:
        ConfigError: naming every key that is unknown or wrong.
    """
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _Strict)  # a safe loader
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such configuration file") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder, expected the YAML file of a run") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of sections (model, quantization, ...), got {content!r:.80}")
    alone = copy.deepcopy(content)
    for assignment in assignments or []:
        _assign(content, assignment)
    try:
        found = _complaints(content)
    except RecursionError as error:
        raise ConfigError(
            f"{path}: holds something that contains itself: an alias (*) inside its anchor (&)"
        ) from error
    if found:
        in_file = _complaints(alone)
        assigned = ", ".join(assignment.partition("=")[0] for assignment in assignments or [])
        told = {
            str(path): [one for one in found if one in in_file],
            f"{path} with --set {assigned}": [one for one in found if one not in in_file],
        }
        raise ConfigError("; ".join(f"{where}: {'; '.join(own)}" for where, own in told.items() if own))
    return RunConfig.model_validate(content)


def make_target(repo: str, private: bool, revision: str | None, pull_request: bool) -> PublishConfig:
    """A place to publish to, as a command line gives it.

    Raises:
        ConfigError: it is none.
    """
    try:
        return PublishConfig(repo=repo, private=private, revision=revision, pull_request=pull_request)
    except ValidationError as error:
        raise ConfigError("; ".join(f"publish.{found}" for found in _explain(error))) from error


def _complaints(content: dict[str, Any]) -> list[str]:
    """Everything that is wrong with a configuration."""
    booleans = dict(_stray_booleans(content))
    found = [
        f"{key}: expected a number, got {told} (YAML reads yes, no, on and off so)" for key, told in booleans.items()
    ]
    try:
        RunConfig.model_validate(content)
    except ValidationError as error:
        found += [one for one in _explain(error) if one.partition(":")[0] not in booleans]
    return found


def _stray_booleans(
    value: Any, location: tuple[int | str, ...] = (), in_list: bool = False
) -> Iterator[tuple[str, str]]:
    """Keys with true and false where a number is wanted, which pydantic would take for 1 and 0."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _stray_booleans(inner, (*location, str(name)))
    elif isinstance(value, list):
        for inner in value:
            yield from _stray_booleans(inner, location, in_list=True)
    elif isinstance(value, bool):
        wanted = _kind(location)
        is_list = typing.get_origin(wanted) is tuple
        kinds = set(typing.get_args(wanted)) or {wanted}
        if in_list == is_list and kinds & {int, float} and bool not in kinds:
            yield ".".join(map(str, location)), str(value).lower()


def _assign(content: dict[str, Any], assignment: str) -> None:
    name, separator, value = assignment.partition("=")
    *sections, key = name.strip().split(".")
    if not separator or not key or not all(sections):
        raise ConfigError(f"--set {assignment}: expected section.key=value, e.g. quantization.bits=3")
    target = content
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {assignment}: {section!r} is not a section")
    try:
        target[key] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {assignment}: the value is no YAML: {error}; text with * or : wants quotes of its own, e.g. "
            "--set 'quantization.ignore=[\"*.o_proj\"]'"
        ) from error


def _explain(error: ValidationError) -> list[str]:
    """A complaint for each key, though several kinds of values may have been tried on it."""
    by_key: dict[str, list[Any]] = {}
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        if path and item["type"] not in _UNKNOWN and _MARKER.fullmatch(path[-1]):
            path.pop()
        key = ".".join(path)
        by_key.setdefault(key, []).append(item)
    return [_complaint(key, items) for key, items in by_key.items()]


def _complaint(key: str, items: list[Any]) -> str:
    first = items[0]
    if first["type"] in _UNKNOWN:
        return f"unknown key {key}{_suggest(first['loc'])}"
    kinds = list(dict.fromkeys(_expected(item) for item in items))
    if all(kinds):
        given = "nothing" if first["input"] is None else f"{first['input']!r:.80}"
        return f"{key}: expected {' or '.join(filter(None, kinds))}, got {given}"
    if first["type"] == "missing":
        return f"{key}: missing"
    messages = "; ".join(
        str(item["msg"]).removeprefix("Value error, ").replace("Input should", "must") for item in items
    )
    shown = "" if first["type"] == "value_error" else f", got {first['input']!r:.80}"
    # A section that checks itself says which of its keys is wrong.
    inner = messages.partition(":")[0] in _keys(_kind(first["loc"]))
    return f"{key}{'.' if inner else ': '}{messages}{shown}" if key else messages


def _expected(item: Any) -> str | None:
    """What kind of value was wanted, where that is what is wrong."""
    if item["type"] == "literal_error":
        return str(item["ctx"]["expected"])
    kind, _, fault = item["type"].rpartition("_")
    return _KINDS.get(kind.removesuffix("_from")) if fault in ("type", "parsing", "float") else None


def _suggest(location: tuple[int | str, ...]) -> str:
    names = list(_keys(_kind(location[:-1])))
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f" (did you mean {close[0]}?)" if close else f"; known here: {', '.join(names)}"


def _kind(location: tuple[int | str, ...]) -> Any:
    """The type of what stands there."""
    kind: Any = RunConfig
    for part in location:
        kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else _keys(kind).get(str(part))
    return kind


def _keys(kind: Any) -> dict[str, Any]:
    """Keys of a section with their types."""
    if dataclasses.is_dataclass(kind):
        return {field.name: typing.get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}
    return {name: field.annotation for name, field in getattr(kind, "model_fields", {}).items()}
