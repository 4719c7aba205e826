"""The identity of a run, which is the content of run.json."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from astro.errors import ConfigError, DamagedError
from astro_dist.config.model_place import likely_place
from astro_dist.run_directory.layout import TRAINING_FILE, RunLayout
from astro_dist.run_directory.records import read_own_json

__all__ = ["Identity", "begun_commit", "begun_texts", "read_identity"]

_COUNT = re.compile(r"texts\.\d+\.(holdout_)?samples")
_WORDS = {
    "source_sha256": "SHA-256 of the source model's files",
    "tokens_sha256": "SHA-256 of the calibration text's tokens",
    "clips_sha256": "SHA-256 of the learned clips of inputs",
    "commit": "commit of model.source",
    "version": "version of astro-dist",
}
"""What the fields of run.json are that are no keys of a configuration."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """Tells a run from all others.

    Attributes:
        key: Hash of everything that can change a byte of the result. Every record has it.
        source_sha256: Fingerprint of the source checkpoint.
        tokens_sha256: SHA-256 of all tokens, to calibrate on and held out.
        version: Version of this project that began the run.
        arithmetic: Settings of the configuration that can change a byte of the result.
        commit: Commit of the Hub repository that the source was read from; None for other sources.
        asked: Repository and revision as the configuration names them, under "source" and "revision"; None for other
            sources.
        clips_sha256: SHA-256 of the learned clips of inputs; None where none are used.
        texts: What was taken of each calibration text, by its number from "0" on: its place as the configuration names
            it, the commit of a dataset on the Hub, and the number of its sequences.
    """

    key: str
    source_sha256: str
    tokens_sha256: str
    version: str
    arithmetic: Mapping[str, Any]
    commit: str | None = None
    asked: Mapping[str, Any] | None = None
    clips_sha256: str | None = None
    texts: Mapping[str, Mapping[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the identity as the JSON object of run.json."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in plain.items() if value is not None}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned. Fields that are missing become empty.

        Args:
            content: JSON object with at least the key.
        """
        texts = {name: str(content.get(name, "")) for name in ("key", "source_sha256", "tokens_sha256", "version")}
        arithmetic: Mapping[str, Any] = content.get("arithmetic", {})
        rest: dict[str, Any] = {name: content.get(name) for name in ("commit", "asked", "texts", "clips_sha256")}
        plain: dict[str, Any] = texts | rest
        return cls(**plain, arithmetic=arithmetic)

    def is_same_run(self, other: "Identity") -> bool:
        """Tell whether two identities are of the same run. The key covers neither the tokens nor the clips of inputs.

        Args:
            other: Identity to compare with.
        """
        fields = ("key", "tokens_sha256", "clips_sha256")
        return all(getattr(self, field) == getattr(other, field) for field in fields)

    def difference(self, other: "Identity") -> str:
        """Say in words what differs between this run and the run that a folder holds.

        Args:
            other: Identity of the run in the folder.
        """
        here, there = self.to_json(), other.to_json()
        ours = _flatten({name: value for name, value in here.items() if name != "key"})
        theirs = _flatten({name: there.get(name) for name in here if name != "key"})
        changed = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
        # The number of sequences that a text gave follows from the settings, and so do the tokens where others differ.
        changed = [name for name in changed if not _COUNT.fullmatch(name)]
        if len(changed) > 1 and any(name.startswith(("arithmetic.calibration.", "texts.")) for name in changed):
            changed = [name for name in changed if name != "tokens_sha256"]
        num_texts = max(len(self.texts or ()), len(other.texts or ()))
        shown = [f"{_in_words(name, num_texts)}: {theirs.get(name)} there, {ours.get(name)} here" for name in changed]
        return "; ".join(shown[:4]) or "of another kind"


def read_identity(root: Path) -> Identity:
    """Read the identity of the run that a folder holds.

    Args:
        root: Folder of the run directory.

    Raises:
        ConfigError: The folder holds no run, or its run.json cannot be read.
    """
    path = RunLayout(root).identity
    if not path.is_file():
        if (root / TRAINING_FILE).is_file():
            raise ConfigError(f"{root}: holds a training, and this command takes runs of quantize; see progress.jsonl")
        if not root.exists():
            raise ConfigError(f"{root}: no such folder{likely_place(str(root))}; expected the folder of a run")
        raise ConfigError(f"{root}: holds no {path.name}, so it is no run directory, or its run has not begun yet")
    try:
        content = read_own_json(path)
    except DamagedError as error:
        raise ConfigError(f"{error}; so it is not known which run this directory holds") from error
    if "key" not in content:
        raise ConfigError(f"{path}: names no run (it has no key); is {root} a run directory?")
    return Identity.from_json(content)


def begun_commit(root: Path, asked: Mapping[str, Any]) -> str | None:
    """Return the commit of the Hub repository with which the run in a folder was begun.

    Args:
        root: Folder of the run directory.
        asked: Repository and revision that the configuration names; see `Identity.asked`.

    Returns:
        The commit; None where no run was begun, or where it asked for another repository or revision.

    Raises:
        ConfigError: The run.json of the folder cannot be read.
    """
    if not RunLayout(root).identity.is_file():
        return None
    begun = read_identity(root)
    return begun.commit if begun.asked == asked else None


def begun_texts(root: Path) -> dict[tuple[str, str | None], str]:
    """Return the commits of the datasets with which the run in a folder was begun, by name and revision as asked.

    Args:
        root: Folder of the run directory.

    Raises:
        ConfigError: The run.json of the folder cannot be read.
    """
    if not RunLayout(root).identity.is_file():
        return {}
    texts = (read_identity(root).texts or {}).values()
    return {(text["source"], text.get("revision")): text["commit"] for text in texts if text.get("commit")}


def _in_words(name: str, num_texts: int) -> str:
    """Name a field of run.json as the configuration names it; one that no key is of is described."""
    section, _, rest = name.partition(".")
    if section == "texts":
        number, _, key = rest.partition(".")
        place = "calibration" if num_texts == 1 else f"calibration.sources.{number}"
        return f"commit of {place}.source" if key == "commit" else f"{place}.{key}"
    if section == "asked":
        return f"model.{rest}"
    return rest if section == "arithmetic" else _WORDS.get(name, name)


def _flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, by the names on the way to them joined with dots."""
    if not isinstance(content, Mapping):
        return {prefix.rstrip("."): content}
    return {name: leaf for key, value in content.items() for name, leaf in _flatten(value, f"{prefix}{key}.").items()}
