"""Read a finished run from its directory: configuration, figures and records, and the card that follows from them."""

import dataclasses
from pathlib import Path, PurePath
from typing import Self

import huggingface_hub

from astro.errors import ConfigError
from astro_dist.config.schema import RunConfig
from astro_dist.config.yaml_file import load_recorded_config
from astro_dist.export.model_card import model_card
from astro_dist.run_directory.identity import Identity, read_identity
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.summary import Summary, read_summary
from astro_dist.run_directory.unit_record import BlockResult
from astro_dist.schedule.names import block_of_unit
from astro_dist.source.model_info import BaseModel

__all__ = ["FinishedRun"]


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run is described by its directory alone.

    Attributes:
        run: Run directory.
        config: Configuration that the run was begun with.
        identity: Version, commit and hashes of the run.
        summary: Figures of the run.
    """

    run: RunDirectory
    config: RunConfig
    identity: Identity
    summary: Summary

    @classmethod
    def open(cls, root: Path) -> Self:
        """Read a run directory.

        Args:
            root: Folder of the run directory.

        Raises:
            ConfigError: The folder holds no run, or a run that is not finished.
            DamagedError: The figures of the run cannot be read.
        """
        identity, config = read_identity(root), load_recorded_config(root / "config.yaml")
        run = RunDirectory(root, identity.key, rounds=config.execution.rounds)
        if not run.summary.is_file():
            raise ConfigError(f"{root}: its run is not finished; `astro-dist quantize` goes on with it")
        return cls(run, config, identity, read_summary(run.summary))

    @property
    def base(self) -> BaseModel:
        """Return the description of the model that was quantized."""
        return self.summary.base_model

    @property
    def title(self) -> str:
        """Return the title of the commit, which is the same whenever this run is published."""
        name = PurePath(self.base.name or self.config.model.source).name
        return f"{name}, {self.summary.average_bits:.3g} bits (astro-dist {self.identity.version})"

    def card(self, repository: str | None) -> huggingface_hub.ModelCard:
        """Write the model's card.

        Args:
            repository: ORG/NAME of the repository that the model goes to; None where there is none.
        """
        last = self.config.execution.rounds - 1
        places = ((unit, block_of_unit(unit)) for unit in self.run.recorded_units())
        blocks = [self.run.read(unit, BlockResult) for unit, place in places if place and place[0] == last]
        return model_card(self.config, self.identity, self.summary, blocks, repository)
