"""The folder of a run's activations on the local disk of a node, for runs whose workers are all on that node.

Nothing of it is needed to go on: what is missing is computed again. A stamp that each start of the driver writes there
tells workers that they see the driver's folder, and not one of the same name on another node.
"""

import platform
import shutil
import uuid
from hashlib import sha256
from pathlib import Path

from astro.errors import ConfigError, RunError, StorageError
from astro.storage.atomic import write_text

__all__ = ["local_activations", "open_activations", "require_same_activations"]

_STAMP = "stamp"


def local_activations(parent: Path, root: Path, key: str) -> Path:
    """Return the folder of a run, which no other run shares.

    Args:
        parent: Folder on the local disk, for any number of runs.
        root: Run directory.
        key: Key of the run.
    """
    name = sha256(f"{root}|{key}".encode()).hexdigest()[:16]
    return parent.expanduser().absolute() / f"{root.name}-{name}"


def open_activations(folder: Path, is_new: bool) -> tuple[str, bool]:
    """Make the folder ready for workers. The driver does so, before they start.

    Args:
        folder: Folder of the run's activations.
        is_new: Whether the run begins, so that whatever is there is of no use.

    Returns:
        The stamp that workers will find there, and whether the folder is missing that a run should have left.

    Raises:
        ConfigError: The folder cannot be made or written.
    """
    if is_new:
        shutil.rmtree(folder, ignore_errors=True)
    is_lost = not is_new and not (folder / _STAMP).is_file()
    stamp = uuid.uuid4().hex
    try:
        write_text(folder / _STAMP, stamp)
    except StorageError as error:
        raise ConfigError(f"output.activations_dir: {error}") from error
    return stamp, is_lost


def require_same_activations(folder: Path, stamp: str) -> None:
    """Refuse a worker that does not see the driver's folder.

    Args:
        folder: Folder of the run's activations.
        stamp: Stamp that the driver wrote there.

    Raises:
        RunError: The folder is not there, or is another node's.
    """
    try:
        is_same = (folder / _STAMP).read_text() == stamp
    except OSError:
        is_same = False
    if not is_same:
        raise RunError(
            f"{platform.node()}: does not see the driver's {folder}; output.activations_dir may be a node's local disk "
            "only where all workers are on the driver's node. Leave it out, or name a folder that all nodes see"
        )
