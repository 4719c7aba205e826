"""Records whose fields are JSON types already."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

__all__ = ["PlainRecord"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainRecord:
    """Writes its fields to JSON as they are, and reads them back."""

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned.

        Fields that a newer version may have added are ignored. A field that an older version did not write has its
        default, if it has one.

        Args:
            content: JSON object with every field that has no default.

        Raises:
            KeyError: A field is missing.
        """
        optional = {field.name for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING}
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: content[name] for name in names if name in content or name not in optional})
