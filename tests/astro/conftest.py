"""Tests of arithmetic run on every kind of device that this machine has."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.devices import devices, on_device


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device on which a test makes its tensors."""
    device = torch.device(request.param)
    with on_device(device):
        yield device
