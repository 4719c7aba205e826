"""What configurations, and the sections of one, have in common."""

import os
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

__all__ = ["Configuration", "Section", "cluster_address"]


class Section(BaseModel):
    """A section of a configuration: a key that it does not know is an error, and nothing changes a value."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Configuration(Section):
    """All sections of one YAML file."""

    def plain(self) -> dict[str, Any]:
        """Return the configuration as JSON types, with every default written out."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the configuration as a YAML document that reads back as the same configuration."""
        return yaml.safe_dump(self.plain(), sort_keys=False)


def cluster_address(ray_address: str) -> str | None:
    """Return the address of the cluster to connect to; None stands for a private one on this machine.

    Args:
        ray_address: Key `ray_address`: an address, or `auto` for the variable RAY_ADDRESS.
    """
    return os.environ.get("RAY_ADDRESS") or None if ray_address == "auto" else ray_address
