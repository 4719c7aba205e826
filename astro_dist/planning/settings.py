"""What a user asked for: the YAML file of a run, or a model and a few keys."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from astro.errors import ConfigError
from astro_dist.config.model_place import likely_place
from astro_dist.config.schema import RunConfig
from astro_dist.config.yaml_file import assigned_key, load_config
from astro_dist.planning.starting_config import starting_config

__all__ = ["MAIN_KEYS", "run_config"]

MAIN_KEYS: Mapping[str, str] = {
    "bits": "quantization.bits",
    "group_size": "quantization.group_size",
    "output": "output.dir",
    "calibration": "calibration.source",
    "mode": "execution.mode",
}
"""The keys of a configuration that have an option of their own, by the name of the option."""

_YAML = (".yaml", ".yml")


def run_config(target: str | Path, assignments: Sequence[str] = (), **main_keys: Any) -> RunConfig:
    """Make the configuration of a run from its YAML file, or from a model and a few keys.

    Args:
        target: Path of a YAML file that describes the run; or a model: a folder, ORG/NAME on the Hub, or the URL of an
            object store.
        assignments: Assignments of the form `section.key=value`, where the value is read as YAML. They win over a
            YAML file, and none may set a key of `main_keys`.
        **main_keys: Values of the keys in `MAIN_KEYS`; None counts as not given.

    Raises:
        InputError: There is no such file or model, or some keys are unknown or wrong.
    """
    unknown = main_keys.keys() - MAIN_KEYS.keys()
    if unknown:
        raise TypeError(f"run_config() got {', '.join(sorted(unknown))}; expected {', '.join(MAIN_KEYS)}")
    given = {MAIN_KEYS[name]: value for name, value in main_keys.items() if value is not None}
    _require_set_once(given, assignments)
    # A value of the command line is text, and YAML would read a path such as `1e3` as a number.
    texts = {key: value if isinstance(value, int | float) else str(value) for key, value in given.items()}
    all_assignments = [*(f"{key}={_as_yaml(key, value)}" for key, value in texts.items()), *assignments]
    name, path = str(target), Path(target).expanduser()
    if path.is_file() or path.suffix in _YAML:
        return load_config(path, all_assignments)
    if not path.exists() and not any(sign in name for sign in ("/", ":")):
        raise ConfigError(
            f"{name}: there is no such file or folder{likely_place(name)}; give the YAML file of a run, or a model: "
            "a folder, ORG/NAME on the Hub, or the URL of an object store"
        )
    return starting_config(name, all_assignments)


def _require_set_once(given: Mapping[str, Any], assignments: Sequence[str]) -> None:
    """Refuse an assignment of a key that has its own option, or of the whole section of one."""
    assigned = set(map(assigned_key, assignments))
    for name, key in MAIN_KEYS.items():
        section, _, _ = key.partition(".")
        if key in given and assigned & {key, section}:
            raise ConfigError(
                f"{key}: set both by --{name.replace('_', '-')} and by --set; leave one out (--set {section}=… "
                "sets the whole section)"
            )


def _as_yaml(key: str, value: str | float) -> str:
    if key == MAIN_KEYS["bits"]:
        return str(value)
    return yaml.safe_dump(value, width=1 << 20).removesuffix("\n").removesuffix("\n...")
