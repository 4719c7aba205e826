"""One half of a symmetric matrix holds all of it."""

import pytest
import torch

from astro.linalg import symmetric
from astro.linalg.symmetric import mirror_, packed, strips, unpacked

pytestmark = pytest.mark.usefixtures("device")


def random_symmetric(size, *layers):
    X = torch.randn(*layers, size, size, generator=torch.Generator().manual_seed(size))
    return X + X.mT


@pytest.fixture(params=[256, 1024], ids=["cpu", "cuda"])
def strip_of(monkeypatch, request, device):
    """Strips of a CPU, and of a GPU."""
    monkeypatch.setitem(symmetric._STRIP, device.type, request.param)


@pytest.mark.parametrize("shape", [(7,), (256, 2), (600,), (1100, 3)])
def test_what_is_packed_comes_back(strip_of, shape):
    S = random_symmetric(*shape)
    upper = S.clone()
    for start in range(0, shape[0], 256):
        upper[..., start + 256 :, start : start + 256] = torch.nan  # not read
    P = packed(upper)
    assert torch.equal(unpacked(P, shape[0]), S)
    assert P.shape[:-1] == S.shape[:-2]


def test_whoever_wrote_a_matrix_has_what_others_read(strip_of):
    """Also where a product is not symmetric to the last bit."""
    S = torch.randn(1100, 1100, generator=torch.Generator().manual_seed(0))
    mirror_(S)
    assert torch.equal(unpacked(packed(S), 1100), S)


def test_a_large_one_is_little_more_than_half():
    assert packed(torch.zeros(4096, 4096)).numel() < 0.54 * 4096**2


def test_mirrored_below_the_diagonal(strip_of):
    S = random_symmetric(600)
    lower = S.clone()
    for strip in strips(S):
        lower[strip.stop :, strip] = 0
    mirror_(lower)
    assert torch.equal(lower, S)
