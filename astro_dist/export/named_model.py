"""Which model a user means by a name: the result of a run, a folder, or a repository."""

import shlex
from pathlib import Path

from astro.errors import ConfigError
from astro_dist.config.schema import ModelConfig
from astro_dist.run_directory.layout import RunLayout
from astro_dist.source.resolve import Source, resolve_source

__all__ = ["find_model"]


def find_model(name: str) -> Source:
    """Find a model: the result of a run, a folder, or a repository.

    Args:
        name: Run directory, folder of a model, ORG/NAME[@REVISION] on the Hub, or an address of an object store.

    Raises:
        InputError: There is no model of this name, or the run has none yet.
    """
    path = Path(name).expanduser().resolve()
    layout = RunLayout.around(path)
    if layout.identity.is_file():
        if not layout.inventory.is_file():
            command = f"astro-dist status {shlex.quote(str(layout.root))}"
            raise ConfigError(f"{name}: its run is not finished; `{command}` tells how far it is")
        return resolve_source(ModelConfig(source=str(layout.model)))
    repository, _, revision = name.partition("@")
    if revision and "://" not in name and not path.exists():
        return resolve_source(ModelConfig(source=repository, revision=revision))
    return resolve_source(ModelConfig(source=name))
