"""One half of a symmetric matrix holds all of it."""

import pytest
import torch

from astro.triangle import mirror_, packed, strips, unpacked


def symmetric(size, *layers):
    X = torch.randn(*layers, size, size, generator=torch.Generator().manual_seed(size))
    return X + X.mT


@pytest.mark.parametrize("shape", [(7,), (256, 2), (600,), (1100, 3)])
def test_what_is_packed_comes_back(shape):
    S = symmetric(*shape)
    upper = S.clone()
    for strip in strips(S):
        upper[..., strip.stop :, strip] = torch.nan  # neither read nor written
    P = packed(upper)
    assert torch.equal(unpacked(P, shape[0]), S)
    assert P.shape[:-1] == S.shape[:-2]


def test_a_large_one_is_little_more_than_half():
    assert packed(torch.zeros(4096, 4096)).numel() < 0.54 * 4096**2


def test_mirrored_below_the_diagonal():
    S = symmetric(600)
    lower = S.clone()
    for strip in strips(S):
        lower[strip.stop :, strip] = 0
    mirror_(lower)
    assert torch.equal(lower, S)
