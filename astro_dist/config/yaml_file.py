"""Read the YAML file that describes one whole run. A key that is not known is an error that names its path."""

import copy
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from astro.errors import ConfigError
from astro_dist.config.keys import fields_of, section_suggestion, suggestion, type_at
from astro_dist.config.schema import PublishConfig, RunConfig
from astro_dist.config.training import TrainConfig

__all__ = ["assigned_key", "load_config", "load_recorded_config", "load_train_config", "make_config", "make_target"]

_Schema = TypeVar("_Schema", bound=BaseModel)

_FORMER_KEYS = {"quantization": {"odd_widths": "indivisible"}, "calibration": {"text_column": "column"}}
"""Names that earlier versions wrote otherwise, and their names now, by section."""

_MARKER = re.compile(r"int|float|bool|str|literal\[.*\]")
"""Pattern of what pydantic puts into a path for the branch of a union that it tried."""
_MISSING = {"model": "model.source", "output": "output.dir", "optimization": "optimization.steps"}
"""What is missing where a section with one required key is missing."""
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "string": "text",
    "tuple": "a list", "dict": "a mapping", "model": "a mapping", "dataclass": "a mapping", "path": "a path",
}  # fmt: skip
"""Kinds of values, by the beginning of pydantic's names of errors."""


class _Strict(yaml.SafeLoader):
    """A loader of plain YAML that refuses a key that stands twice in a mapping: else the last would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make the mapping of a node.

        Raises:
            ConstructorError: A key stands in the mapping twice.
        """
        keys: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} is there twice", problem_mark=key_node.start_mark
                )
            keys.append(key)
        return super().construct_mapping(node, deep)


def load_config(path: Path, assignments: Sequence[str] | None = None) -> RunConfig:
    """Read a YAML file, apply assignments to it and validate it.

    Args:
        path: Path of the YAML file.
        assignments: Assignments of the form `section.key=value`, where the value is read as YAML.

    Raises:
        ConfigError: The file cannot be read, or some keys are unknown or wrong; the message names all of them.
    """
    return make_config(_read_mapping(path), assignments, str(path))


def make_config(content: dict[str, Any], assignments: Sequence[str] | None, origin: str) -> RunConfig:
    """Apply assignments to what a configuration holds, and validate it.

    Args:
        content: Content of the configuration by section.
        assignments: Assignments of the form `section.key=value`, where the value is read as YAML.
        origin: Name of what the content comes from, for errors.

    Raises:
        ConfigError: Some keys are unknown or wrong; the message names all of them.
    """
    return _checked(RunConfig, content, assignments, origin)


def load_train_config(path: Path, assignments: Sequence[str] | None = None) -> TrainConfig:
    """Read the YAML file of a training, apply assignments to it and validate it.

    Args:
        path: Path of the YAML file.
        assignments: Assignments of the form `section.key=value`, where the value is read as YAML.

    Raises:
        ConfigError: The file cannot be read, or some keys are unknown or wrong; the message names all of them.
    """
    return _checked(TrainConfig, _read_mapping(path), assignments, str(path))


def _checked(schema: type[_Schema], content: dict[str, Any], assignments: Sequence[str] | None, origin: str) -> _Schema:
    """Apply assignments to what a configuration holds, and validate it."""
    assigned_content = copy.deepcopy(content)
    for assignment in assignments or []:
        _assign(assigned_content, assignment)
    try:
        complaints = _complaints(schema, assigned_content)
    except RecursionError as error:
        raise ConfigError(
            f"{origin}: holds something that contains itself: an alias (*) inside its anchor (&)"
        ) from error
    if complaints:
        of_content = _complaints(schema, content)
        keys = list(map(assigned_key, assignments or []))
        # Of several assignments the one is named that is wrong, if only one is.
        named = [text for text in complaints if text not in of_content and text.partition(":")[0] in keys]
        by_origin = {
            f"{origin}: ": [text for text in complaints if text in of_content],
            f"{origin} with ": named,
            f"{origin} with {', '.join(keys)}: ": [text for text in complaints if text not in (*of_content, *named)],
        }
        raise ConfigError("; ".join(f"{origin}{'; '.join(texts)}" for origin, texts in by_origin.items() if texts))
    return schema.model_validate(assigned_content)


def load_recorded_config(path: Path, assignments: list[str] | None = None) -> RunConfig:
    """Read the configuration that a run keeps beside its result; an earlier version may have written it.

    Args:
        path: Path of config.yaml in the run directory.
        assignments: Assignments of the form `section.key=value`, where the value is read as YAML.

    Raises:
        ConfigError: The file cannot be read, or is no configuration of a run.
    """
    content = _read_mapping(path)
    for assignment in assignments or []:
        _assign(content, assignment)
    for name, now in _FORMER_KEYS.items():
        if isinstance(section := content.get(name), dict):
            content[name] = {now.get(key, key): value for key, value in section.items()}
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(_explain(RunConfig, error))}") from error


def make_target(repo: str, private: bool, revision: str | None, pull_request: bool) -> PublishConfig:
    """Make the section `publish` of a configuration from the options of a command line.

    Args:
        repo: ORG/NAME of the repository on the Hub.
        private: Whether a new repository is private.
        revision: Branch to commit to; None means main.
        pull_request: Whether to open a pull request.

    Raises:
        ConfigError: The options are wrong, or contradict each other.
    """
    try:
        return PublishConfig(repo=repo, private=private, revision=revision, pull_request=pull_request)
    except ValidationError as error:
        raise ConfigError("; ".join(f"publish.{complaint}" for complaint in _explain(PublishConfig, error))) from error


def _read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping of sections."""
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
    return content


def _complaints(schema: type[BaseModel], content: dict[str, Any]) -> list[str]:
    """List everything that is wrong with a configuration."""
    booleans = dict(_stray_booleans(schema, content))
    complaints = [
        f"{key}: expected a number, got {value} (YAML reads yes, no, on and off so)" for key, value in booleans.items()
    ]
    try:
        schema.model_validate(content)
    except ValidationError as error:
        complaints += [text for text in _explain(schema, error) if text.partition(":")[0] not in booleans]
    return complaints


def _stray_booleans(
    schema: type[BaseModel], value: Any, location: tuple[int | str, ...] = (), in_list: bool = False
) -> Iterator[tuple[str, str]]:
    """Find the keys with true or false where a number is expected; pydantic would take them for 1 and 0."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _stray_booleans(schema, inner, (*location, str(name)))
    elif isinstance(value, list):
        for inner in value:
            yield from _stray_booleans(schema, inner, location, in_list=True)
    elif isinstance(value, bool):
        wanted = type_at(schema, location)
        is_list = typing.get_origin(wanted) is tuple
        kinds = set(typing.get_args(wanted)) or {wanted}
        if in_list == is_list and kinds & {int, float} and bool not in kinds:
            yield ".".join(map(str, location)), str(value).lower()


def assigned_key(assignment: str) -> str:
    """Return the key that an assignment sets, such as "quantization.bits".

    Args:
        assignment: Assignment of the form `section.key=value`.
    """
    return assignment.partition("=")[0].strip()


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


def _explain(schema: type[BaseModel], error: ValidationError) -> list[str]:
    """Make one complaint for each key, although pydantic may have tried several kinds of values on it."""
    by_key: dict[str, list[Any]] = {}
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        if path and item["type"] not in _UNKNOWN and _MARKER.fullmatch(path[-1]):
            path.pop()
        key = ".".join(path)
        by_key.setdefault(key, []).append(item)
    return [_complaint(schema, key, items) for key, items in by_key.items()]


def _complaint(schema: type[BaseModel], key: str, items: list[Any]) -> str:
    first = items[0]
    if first["type"] in _UNKNOWN:
        return f"unknown key {key}{_suggest(schema, first['loc'])}"
    kinds = list(dict.fromkeys(_expected(item) for item in items))
    if all(kinds):
        value = "nothing" if first["input"] is None else f"{first['input']!r:.80}"
        return f"{key}: expected {' or '.join(filter(None, kinds))}, got {value}"
    if first["type"] == "missing":
        return f"{_MISSING.get(key, key)}: missing"
    messages = "; ".join(
        str(item["msg"]).removeprefix("Value error, ").replace("Input should", "must") for item in items
    )
    shown = "" if first["type"] == "value_error" else f", got {first['input']!r:.80}"
    # A section that checks itself says which of its keys is wrong.
    inner = messages.partition(":")[0] in fields_of(type_at(schema, first["loc"]))
    return f"{key}{'.' if inner else ': '}{messages}{shown}" if key else messages


def _expected(item: Any) -> str | None:
    """Return the kind of value that was expected; None where something else is wrong."""
    if item["type"] == "literal_error":
        return str(item["ctx"]["expected"])
    kind, _, fault = item["type"].rpartition("_")
    return _KINDS.get(kind.removesuffix("_from")) if fault in ("type", "parsing", "float") else None


def _suggest(schema: type[BaseModel], location: tuple[int | str, ...]) -> str:
    now = _FORMER_KEYS.get(str(location[0]), {}).get(str(location[-1]))
    if now:
        return f" (it is called {now} now)"
    if len(location) == 1:
        return section_suggestion(schema, str(location[0]))
    return suggestion(str(location[-1]), fields_of(type_at(schema, location[:-1])))
