"""The inverse by halves against float64."""

import pytest
import torch

from astro.linalg.spd_inverse import invert_
from tests.support.models import correlated_inputs

pytestmark = pytest.mark.usefixtures("device")


def matrices(columns, count=2):
    X = torch.stack([correlated_inputs(2 * columns, columns, seed) for seed in range(count)])
    H = X.mT @ X
    H /= torch.linalg.matrix_norm(H, 2).unsqueeze(-1).unsqueeze(-1)
    return H + 1e-3 * torch.eye(columns, dtype=torch.float64)


@pytest.mark.parametrize("columns", [1, 64, 257, 600, 1100])
def test_inverse_against_float64(columns):
    H = matrices(columns)
    M = H.float()
    assert not invert_(M).any()
    expected = torch.linalg.inv(H)
    assert float((M - expected).norm() / expected.norm()) < 1e-4
    torch.testing.assert_close(M, M.mT, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_what_is_above_the_diagonal_is_not_read():
    M = matrices(600).float()
    lower = M.tril()
    invert_(M)
    invert_(lower)
    assert torch.equal(M, lower)


@pytest.mark.parametrize("column", [3, 290, 599])
def test_matrix_that_is_not_positive_definite_is_told_apart(column):
    M = matrices(600).float()
    M[1, column, column] = -1.0
    assert (invert_(M) > 0).tolist() == [False, True]
