"""run.json, the mark of a run directory: which run it holds."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from astro.errors import ConfigError, DamagedError
from astro_dist.run_directory.layout import RunLayout
from astro_dist.run_directory.records import read_own_json

__all__ = ["Identity", "begun_commit", "read_identity"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """What tells a run from all others.

    Attributes:
        key: Hash of everything that can change a byte of the result; every record carries it.
        source_sha256: Fingerprint of the source checkpoint.
        tokens_sha256: SHA-256 of the calibration tokens, those held out among them.
        version: Version of this project that began the run.
        arithmetic: Settings of the configuration that can change a byte of the result.
        commit: Commit of the Hub repository that the source was read from; None for other sources.
        asked: Repository and revision as the configuration names them; None for other sources.
    """

    key: str
    source_sha256: str
    tokens_sha256: str
    version: str
    arithmetic: Mapping[str, Any]
    commit: str | None = None
    asked: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The identity as the JSON object of run.json."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in plain.items() if value is not None}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` gave; what is not there stays empty.

        Args:
            content: JSON object with at least the key.
        """
        texts = {name: str(content.get(name, "")) for name in ("key", "source_sha256", "tokens_sha256", "version")}
        arithmetic = content.get("arithmetic", {})
        return cls(**texts, arithmetic=arithmetic, commit=content.get("commit"), asked=content.get("asked"))

    def is_same_run(self, other: "Identity") -> bool:
        """Whether two identities are of one run: by the key, and by the tokens, which do not follow from it.

        Args:
            other: Identity to compare with.
        """
        return (self.key, self.tokens_sha256) == (other.key, other.tokens_sha256)

    def difference(self, there: "Identity") -> str:
        """What tells this run from the run that a folder holds, in words.

        Args:
            there: Identity of the run in the folder.
        """
        here, plain = self.to_json(), there.to_json()
        ours = _flatten({name: value for name, value in here.items() if name != "key"})
        theirs = _flatten({name: plain.get(name) for name in here if name != "key"})
        changed = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
        if len(changed) > 1 and any(name.startswith("arithmetic.calibration.") for name in changed):
            changed = [name for name in changed if name != "tokens_sha256"]  # which follows from those
        shown = [
            f"{name.removeprefix('arithmetic.')}: {theirs.get(name)} there, {ours.get(name)} here" for name in changed
        ]
        return "; ".join(shown[:4]) or "of another kind"


def read_identity(root: Path) -> Identity:
    """Read which run a folder holds.

    Args:
        root: Folder of the run directory.

    Raises:
        ConfigError: The folder holds no run.
    """
    mark = RunLayout(root).identity
    if not mark.is_file():
        raise ConfigError(f"{root}: holds no {mark.name}, so it is no run directory, or its run has not begun yet")
    try:
        content = read_own_json(mark)
    except DamagedError as error:
        raise ConfigError(f"{error}; so it is not known which run this directory holds") from error
    if "key" not in content:
        raise ConfigError(f"{mark}: names no run (it has no key); is {root} a run directory?")
    return Identity.from_json(content)


def begun_commit(root: Path, asked: Mapping[str, Any]) -> str | None:
    """The commit of a Hub repository that the run in a folder was begun with.

    Args:
        root: Folder of the run directory.
        asked: Repository and revision of the configuration; there is no commit where the run asked for others.

    Raises:
        ConfigError: The folder's mark cannot be read.
    """
    if not RunLayout(root).identity.is_file():
        return None
    begun = read_identity(root)
    return begun.commit if begun.asked == asked else None


def _flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, Mapping):
        return {prefix.rstrip("."): content}
    return {name: leaf for key, value in content.items() for name, leaf in _flatten(value, f"{prefix}{key}.").items()}
