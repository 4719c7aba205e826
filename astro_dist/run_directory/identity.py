"""run.json, the mark of a run directory: which run it holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astro.errors import CheckpointError, ConfigError
from astro.storage.atomic import read_json
from astro_dist.config.schema import RunConfig

__all__ = ["MARK", "begun_commit", "difference", "read_identity"]

MARK = "run.json"


def read_identity(root: Path) -> dict[str, Any]:
    """What identifies the run in a folder: `key`, `version`, fingerprints and hashes.

    Raises:
        ConfigError: the folder holds no run.
    """
    mark = root / MARK
    if not mark.is_file():
        raise ConfigError(f"{root}: holds no {MARK}, so it is no run directory, or its run has not begun yet")
    try:
        identity = read_json(mark)
    except CheckpointError as error:
        raise ConfigError(f"{error}; so it is not known which run this directory holds") from error
    if "key" not in identity:
        raise ConfigError(f"{mark}: names no run (it has no key); is {root} a run directory?")
    return identity


def begun_commit(root: Path, asked: Mapping[str, Any]) -> str | None:
    """The commit of a Hub repository that the run in a folder was begun with.

    Args:
        root: the folder.
        asked: repository and revision of the configuration; with others than the run's there is none.
    """
    mark = root / MARK
    begun = read_json(mark) if mark.is_file() else {}
    commit: str | None = begun.get("commit") if begun.get("asked") == asked else None
    return commit


def difference(config: RunConfig, identity: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What tells a run from the one that a folder holds, in words.

    Args:
        config: of the run.
        identity: what else belongs to it.
        found: the folder's mark.
    """
    there = _flatten({name: found.get(name) for name in (*identity, "arithmetic")})
    here = _flatten({**identity, "arithmetic": config.arithmetic()})
    changed = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if len(changed) > 1 and any(name.startswith("arithmetic.calibration.") for name in changed):
        changed = [name for name in changed if name != "tokens_sha256"]  # which follows from those
    shown = [f"{name.removeprefix('arithmetic.')}: {there.get(name)} there, {here.get(name)} here" for name in changed]
    return "; ".join(shown[:4]) or "of another kind"


def _flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix.rstrip("."): content}
    return {name: leaf for key, value in content.items() for name, leaf in _flatten(value, f"{prefix}{key}.").items()}
