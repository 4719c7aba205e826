"""Factors of matrices side by side and one by one, and which way a device goes."""

from types import SimpleNamespace

import pytest
import torch

from astro.linalg import cholesky
from astro.linalg.cholesky import factorize


def hessians(count, columns):
    X = torch.randn(count, 2 * columns, columns, generator=torch.Generator().manual_seed(0))
    return X.mT @ X


def test_one_by_one_the_factors_are_the_same(monkeypatch):
    H = hessians(3, 40)
    H[1] -= 30 * torch.eye(40)  # its damping has to be raised
    order = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    together = factorize(H, order, 1e-4, 10.0, ["a", "b", "c"])
    monkeypatch.setattr(cholesky, "_is_faster_one_by_one", lambda P: True)
    apart = factorize(H, order, 1e-4, 10.0, ["a", "b", "c"])
    assert together.attempts.tolist() == apart.attempts.tolist() == [1, int(together.attempts[1]), 1]
    assert int(together.attempts[1]) > 1
    for name in ("feedback", "cost", "damping"):
        assert torch.equal(getattr(together, name), getattr(apart, name))
    assert together.feedback.stride() == apart.feedback.stride()


@pytest.mark.parametrize(
    ("device", "shape", "expected"),
    [
        ("cuda", (32, 2048, 2048), True),
        ("cuda", (128, 1024, 1024), False),
        ("cuda", (1, 8192, 8192), False),
        ("cuda", (8192, 8192), False),
        ("cpu", (32, 2048, 2048), False),
    ],
)
def test_a_gpu_factors_small_matrices_together_and_wide_ones_alone(device, shape, expected):
    class Matrices(SimpleNamespace):
        def __len__(self):
            return shape[0]

    P = Matrices(device=torch.device(device), shape=shape, ndim=len(shape))
    assert cholesky._is_faster_one_by_one(P) == expected
