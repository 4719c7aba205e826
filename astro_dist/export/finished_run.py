"""A finished run as its directory tells it: configuration, figures, records; and the card that follows from them."""

import dataclasses
from pathlib import Path, PurePath
from typing import Any

import huggingface_hub

from astro.errors import ConfigError
from astro.storage.atomic import read_json
from astro_dist.config.schema import RunConfig
from astro_dist.config.yaml_file import load_config
from astro_dist.export.model_card import model_card
from astro_dist.run_directory.identity import read_identity
from astro_dist.run_directory.records import RunDirectory
from astro_dist.source.model_info import BaseModel

__all__ = ["FinishedRun"]


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What there is to say of a run, from its directory alone.

    Attributes:
        run: the directory.
        config: that it was begun with.
        identity: version, commit and hashes.
        summary: its figures.
    """

    run: RunDirectory
    config: RunConfig
    identity: dict[str, Any]
    summary: dict[str, Any]

    @classmethod
    def open(cls, root: Path) -> "FinishedRun":
        """Read a run directory.

        Raises:
            ConfigError: it holds no run, or one that is not finished.
        """
        identity, config = read_identity(root), load_config(root / "config.yaml")
        run = RunDirectory(root, identity["key"], config.execution.rounds)
        summary = read_json(run.summary) if run.summary.is_file() else {}
        if "base_model" not in summary:
            raise ConfigError(f"{root}: its run is not finished; `astro-dist quantize` goes on with it")
        return cls(run, config, identity, summary)

    @property
    def base(self) -> BaseModel:
        """What was quantized."""
        return BaseModel.of(self.summary["base_model"])

    @property
    def title(self) -> str:
        """Of the commit: the same whenever this run is published."""
        name = PurePath(self.base.name or self.config.model.source).name
        return f"{name}, {self.summary['average_bits']:.3g} bits (astro-dist {self.identity['version']})"

    def card(self, repository: str | None) -> huggingface_hub.ModelCard:
        """The model's card.

        Args:
            repository: ORG/NAME that it goes to, if any.
        """
        last = self.config.execution.rounds - 1
        records = sorted((self.run.root / "records").glob(f"round-{last}-block-*.json"))
        blocks = [self.run.read(path.stem) for path in records]
        return model_card(self.config, self.summary, self.base, blocks, self.identity, repository)
