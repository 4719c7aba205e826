"""What of a configuration is not the default."""

from typing import Any

import yaml

from astro_dist.config.schema import RunConfig

__all__ = ["changed_settings"]


def changed_settings(config: RunConfig) -> list[tuple[str, str, str]]:
    """List the keys that differ from their defaults, with the value and the default as YAML; the default may be empty.

    Args:
        config: Configuration of a run.
    """
    required = {"model": {"source": config.model.source}, "output": {"dir": str(config.output.dir)}}
    usual, rows = RunConfig.model_validate(required).plain(), []
    for section, keys in config.plain().items():
        for key, value in keys.items():
            is_required = key in required.get(section, {})
            if is_required or value != usual[section][key]:
                default = "" if is_required else _written(usual[section][key])
                rows.append((f"{section}.{key}", _written(value), default))
    return rows


def _written(value: Any) -> str:
    written = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True)
    return written.removesuffix("...\n").strip()
