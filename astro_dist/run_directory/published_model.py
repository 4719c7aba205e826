"""Say where on the Hub the model of a run is, for the summary, the journal and the record of uploads."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

__all__ = ["PublishedModel"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A published model is one commit of a repository on the Hub.

    Attributes:
        repository: ORG/NAME of the repository.
        revision: Branch, or reference of the pull request, that the commit was made on.
        commit: Hash of the commit.
        num_files: Number of files of the model.
        size_bytes: Size of all files together, in bytes.
        seconds: Time that publishing took.
        url: Address of the model's page.
    """

    repository: str
    revision: str
    commit: str
    num_files: int
    size_bytes: int
    seconds: float
    url: str

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        return {
            "repository": self.repository, "revision": self.revision, "commit": self.commit, "files": self.num_files,
            "bytes": self.size_bytes, "seconds": self.seconds, "url": self.url,
        }  # fmt: skip

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned.

        Args:
            content: JSON object with every field.
        """
        return cls(
            repository=content["repository"], revision=content["revision"], commit=content["commit"],
            num_files=content["files"], size_bytes=content["bytes"], seconds=content["seconds"], url=content["url"],
        )  # fmt: skip
