"""What the sections of a configuration have in common."""

from pydantic import BaseModel, ConfigDict

__all__ = ["Section"]


class Section(BaseModel):
    """A section of a configuration: a key that it does not know is an error, and nothing changes a value."""

    model_config = ConfigDict(extra="forbid", frozen=True)
