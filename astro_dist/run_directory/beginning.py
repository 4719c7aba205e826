"""The beginning of a run: how a folder becomes its run directory, and how the run recognizes it later."""

from pathlib import Path
from typing import TYPE_CHECKING

from astro.errors import ConfigError, DamagedError
from astro.storage.atomic import PARTIAL_SUFFIX, write_bytes, write_json, write_text
from astro.storage.checked_tensors import load_part, save_part
from astro_dist.config.schema import RunConfig
from astro_dist.run_directory import lock
from astro_dist.run_directory.identity import Identity, read_identity
from astro_dist.run_directory.records import RunDirectory

if TYPE_CHECKING:
    import torch

__all__ = ["begin", "is_begun", "keep_side_files", "mend_tokens"]


def is_begun(run: RunDirectory, identity: Identity) -> bool:
    """Tell whether this run was begun here before. A run that ended before its first unit does not count.

    Args:
        run: Run directory, which need not be there yet.
        identity: Identity of this run.

    Raises:
        ConfigError: The directory holds another run, or files that belong to no run.
    """
    # A run that ends before its first unit may leave these files behind.
    before = (run.identity, run.config, run.journal_file, run.tokens)
    names = {path.name for path in before} | {lock.NAME}
    paths = list(run.root.iterdir()) if run.root.is_dir() else []
    others = [path for path in paths if path.name not in names and path.suffix != PARTIAL_SUFFIX]
    if run.identity.is_file() and others:
        begun = read_identity(run.root)
        if not identity.is_same_run(begun):
            raise ConfigError(
                f"{run.root}: holds another run ({identity.difference(begun)}); "
                "choose another directory with --output, or remove this one if it is not wanted. Only the "
                "version that began a run can go on with it; a finished one can be verified and published by any"
            )
        return True
    if others or (run.root.exists() and not run.root.is_dir()):
        raise ConfigError(f"{run.root}: exists and is not a run directory; choose another one with --output")
    return False


def begin(run: RunDirectory, config: RunConfig, identity: Identity, tokens: "dict[str, torch.Tensor]") -> None:
    """Make a folder the directory of a run. The file with the identity is written last.

    Args:
        run: Run directory, which exists and is locked.
        config: Configuration of the run.
        identity: Identity of the run.
        tokens: Tokens of every chunk by name, int64 [B, T].
    """
    write_text(run.config, config.to_yaml())
    save_part(run.tokens, tokens)
    write_json(run.identity, identity.to_json())


def keep_side_files(run: RunDirectory, folder: Path) -> Path:
    """Copy the small files of a remote source to the run directory, where every node sees them.

    Args:
        run: Run directory.
        folder: Folder of the files, on this machine.

    Returns:
        The folder of the copies.
    """
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.endswith(PARTIAL_SUFFIX):
            write_bytes(run.source / path.relative_to(folder), path.read_bytes())
    return run.source


def mend_tokens(run: RunDirectory, tokens: "dict[str, torch.Tensor]") -> None:
    """Write the tokens again if their file is missing or damaged. They are part of the run's identity.

    Args:
        run: Run directory.
        tokens: Tokens of every chunk by name, int64 [B, T].
    """
    try:
        load_part(run.tokens)
    except DamagedError as error:
        run.journal.note("damaged", unit="tokens", reason=str(error))
        save_part(run.tokens, tokens)
