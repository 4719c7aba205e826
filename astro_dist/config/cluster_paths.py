"""Paths of a configuration that travels: on a cluster a relative path is another folder in every process."""

from collections.abc import Mapping
from pathlib import Path

from astro.errors import ConfigError
from astro_dist.config.model_place import is_elsewhere
from astro_dist.config.schema import RunConfig
from astro_dist.config.text_place import PYTHON_DOCS, is_dataset

__all__ = ["require_absolute", "require_absolute_paths"]


def require_absolute_paths(config: RunConfig) -> None:
    """Refuse a configuration that only means the same in this folder of this machine.

    Args:
        config: The configuration of a run that other machines or processes will read.

    Raises:
        ConfigError: A path in it is relative; the message names its key.
    """
    paths = {"output.dir": config.output.dir}
    source = config.model.source
    if not is_elsewhere(source):
        paths["model.source"] = Path(source)
    if config.model.cache_dir is not None:
        paths["model.cache_dir"] = config.model.cache_dir
    if config.output.activations_dir is not None:
        paths["output.activations_dir"] = config.output.activations_dir
    for i, text in enumerate(config.calibration.texts):
        if text.source != PYTHON_DOCS and not is_dataset(text.source):
            key = f"sources.{i}.source" if config.calibration.sources else "source"
            paths[f"calibration.{key}"] = Path(text.source)
    require_absolute(paths)


def require_absolute(paths: Mapping[str, Path]) -> None:
    """Refuse relative paths.

    Args:
        paths: Paths by their keys.

    Raises:
        ConfigError: A path is relative; the message names its key.
    """
    for name, path in paths.items():
        if not path.expanduser().is_absolute():
            raise ConfigError(f"{name}: {path} is relative; on a cluster give an absolute path that every node sees")
