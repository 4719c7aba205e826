"""The state of a training in a folder: torch's distributed checkpoint, which any number of workers reads, and clips."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

__all__ = ["load_checkpoint", "save_checkpoint"]

_SMALL = "clips.pt"
"""Name of the file with what every worker has alike: clips, their optimizer's state, and the number of steps."""


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, small: dict[str, Any] | None
) -> None:
    """Write the state of a training. All workers call it; what each writes belongs into one folder.

    Args:
        folder: Folder of this worker.
        model: The model.
        optimizer: Optimizer of its parameters.
        small: What every worker has alike; None on all workers but the first.
    """
    weights, state = get_state_dict(model, optimizer)
    with _alone_or_not():
        save({"model": weights, "optimizer": state}, checkpoint_id=str(folder))
    if small is not None:
        torch.save(small, folder / _SMALL)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Any]:
    """Take the state of a model and its optimizer, and return what every worker has alike.

    Args:
        folder: Folder with what all workers wrote, of which there may have been another number.
        model: The model.
        optimizer: Optimizer of its parameters.
        device: Device of what is returned.
    """
    weights, state = get_state_dict(model, optimizer)
    content: dict[str, Any] = {"model": weights, "optimizer": state}
    with _alone_or_not():
        load(content, checkpoint_id=str(folder))
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    small: dict[str, Any] = torch.load(folder / _SMALL, map_location=device, weights_only=True)
    return small


@contextlib.contextmanager
def _alone_or_not() -> Iterator[None]:
    """Silence torch's warning that a process without a group is taken for the only one, which it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield
