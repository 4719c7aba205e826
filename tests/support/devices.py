"""The devices that tests of arithmetic run on: the CPU, and the GPU of a machine that has one.

A test asks for the fixture `device`, mostly for its whole module: `pytestmark = pytest.mark.usefixtures("device")`.
What the test makes then lies on that device, and what the product makes lies where the product puts it, so that a
tensor which the product leaves on the wrong device is an error. `pytest -n 0 -m gpu` runs all of them on the GPU alone.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

__all__ = ["devices", "here", "on_device"]

_MAKERS = {
    "arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros",
}  # fmt: skip
_TESTS = str(Path(__file__).parents[1])
_current = torch.device("cpu")


def devices() -> list:
    """Return the parameters of the fixture `device`: the CPU, and CUDA where there is a GPU."""
    return ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


def here() -> torch.device:
    """Return the device of the test that runs."""
    return _current


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Put what tests make on a device. Random numbers are drawn on the CPU, so that they are the same everywhere."""
    global _current
    before, _current = _current, device
    try:
        with _OnDevice(device):
            yield
    finally:
        _current = before


class _OnDevice(TorchFunctionMode):
    """Moves what is made by a call in the folder of the tests that names no device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in _MAKERS or (kwargs or {}).get("device") is not None:
            return made
        return made.to(self._device) if _is_called_by_a_test() else made


def _is_called_by_a_test() -> bool:
    """Tell whether the frame that called torch belongs to a test or its helpers."""
    frame = sys._getframe(2)
    return frame.f_code.co_filename.startswith(_TESTS)
