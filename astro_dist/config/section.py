"""What the sections of a configuration have in common."""

import os

from pydantic import BaseModel, ConfigDict

__all__ = ["Section", "cluster_address"]


class Section(BaseModel):
    """A section of a configuration: a key that it does not know is an error, and nothing changes a value."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def cluster_address(ray_address: str) -> str | None:
    """Return the address of the cluster to connect to; None stands for a private one on this machine.

    Args:
        ray_address: Key `ray_address`: an address, or `auto` for the variable RAY_ADDRESS.
    """
    return os.environ.get("RAY_ADDRESS") or None if ray_address == "auto" else ray_address
