"""The state of a training in a folder: torch's distributed checkpoint, which any number of workers reads, and clips."""

import contextlib
import errno
import io
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from astro.errors import DamagedError, StorageError

__all__ = ["lasts", "load_checkpoint", "save_checkpoint", "writing"]

_COMMON = "clips.pt"
"""Name of the file with what every worker has alike: clips, their optimizer's state, and the number of steps."""
_ROOM = 1 << 20
"""Bytes that are free where a disk is not full."""
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, common: dict[str, Any] | None
) -> None:
    """Write the state of a training. All workers call it; what each writes belongs into one folder.

    Args:
        folder: Folder of this worker.
        model: The model.
        optimizer: Optimizer of its parameters.
        common: What every worker has alike; None on all workers but the first.

    Raises:
        StorageError: The folder cannot be written, by this worker or by another one.
    """
    weights, state = get_state_dict(model, optimizer)
    with writing(folder), _alone_or_not():
        save({"model": weights, "optimizer": state}, checkpoint_id=str(folder))
        if common is not None:
            content = io.BytesIO()
            torch.save(common, content)
            (folder / _COMMON).write_bytes(content.getbuffer())


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Take the state of a model and its optimizer, and return what every worker has alike, on the CPU.

    Args:
        folder: Folder with what all workers wrote, of which there may have been another number.
        model: The model.
        optimizer: Optimizer of its parameters.

    Raises:
        DamagedError: The folder cannot be read, by this worker or by another one.
    """
    weights, state = get_state_dict(model, optimizer)
    content: dict[str, Any] = {"model": weights, "optimizer": state}
    try:
        with _alone_or_not():
            load(content, checkpoint_id=str(folder))
        common: dict[str, Any] = torch.load(folder / _COMMON, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, CheckpointException) as error:
        reason = f"this checkpoint cannot be read: {_cause(error)}; see that every node sees all of it"
        raise DamagedError(folder, reason) from error
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    return common


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Name the folder of a checkpoint where the body of a `with` statement cannot write it.

    Args:
        folder: The folder.

    Raises:
        StorageError: It cannot be written.
    """
    try:
        yield
    except (OSError, CheckpointException) as error:
        cause = _cause(error)
        if not isinstance(cause, OSError) and not _has_room(folder):
            cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # torch says something else of a full disk
        raise StorageError(f"{folder}: the checkpoint cannot be written: {cause}") from cause


def lasts(error: StorageError) -> bool:
    """Return whether what could not be written cannot be a moment later either, because a disk is full, say.

    Args:
        error: The error.
    """
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _LASTING


def _has_room(folder: Path) -> bool:
    place = next((path for path in (folder, *folder.parents) if path.is_dir()), folder)
    return shutil.disk_usage(place).free > _ROOM


def _cause(error: BaseException) -> BaseException:
    """Return what went wrong on the first worker on which something did."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


@contextlib.contextmanager
def _alone_or_not() -> Iterator[None]:
    """Silence torch's warning that a process without a group is taken for the only one, which it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield
