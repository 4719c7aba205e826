"""GPTQ: the published algorithm, its laws, on correlated inputs."""

import pytest
import torch

from astro.config import LayerScheme, SolverSettings
from astro.linalg.cholesky import factorize
from astro.linalg.symmetric import layer_error
from astro.quantization.gptq import activation_order, solve
from astro.quantization.grid import fit_grid
from tests.support.devices import here
from tests.support.models import correlated_inputs, random_weights

pytestmark = pytest.mark.usefixtures("device")


def problem(rows, columns, seed=0, scale_search="minmax", **changes):
    X = correlated_inputs(3 * columns, columns, seed)
    H = (X.T @ X / len(X)).float()
    W = random_weights(rows, columns, seed + 1)
    scheme = LayerScheme(**{"group_size": 8, "bits": 3, **changes})
    return W, H, fit_grid(W, scheme, SolverSettings(scale_search=scale_search), torch.float32)


def ties(Q):
    """How many integers may differ between tiles of other sizes: on a GPU their products round differently."""
    return 0 if here().type == "cpu" else 0.01 * Q.numel()


def published(W, H, order, grid, damping):
    """The paper's loop in float64: eliminate columns from H⁻¹ by its Cholesky factor, one row at a time."""
    W, H = W.double().clone(), H.double().clone()
    H.diagonal().add_(damping * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.linalg.inv(H[order][:, order])).mT  # upper, H⁻¹ = Uᵀ U
    Q = torch.zeros(W.shape, dtype=torch.int8)
    for row in range(len(W)):
        w = W[row][order]
        for i in range(len(w)):
            group = int(order[i]) // grid.group_size
            s, z = float(grid.scale[row, group]), float(grid.zero[row, group])
            q = min(grid.q_max, max(grid.q_min, round(float(w[i]) / s) + z))
            Q[row, order[i]] = int(q)
            error = (w[i] - (q - z) * s) / U[i, i]
            w[i + 1 :] -= error * U[i, i + 1 :]
    return Q


@pytest.mark.parametrize("columns", [8, 24, 136, 264])
@pytest.mark.parametrize("symmetric", [True, False])
def test_against_the_published_elimination_in_float64(columns, symmetric):
    W, H, grid = problem(4, columns, symmetric=symmetric)
    order = activation_order(H)
    expected = published(W, H, order, grid, 0.01)
    Q = solve(W, factorize(H, order, 0.01, 1.0, ["x"]), grid)
    assert int(Q.ne(expected).sum()) < 0.01 * Q.numel()  # a tie may fall the other way in float32
    ours, theirs = (float(layer_error(W, grid.dequantize(q), H).sum()) for q in (Q, expected))
    assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_never_worse_than_rounding_on_these_seeds(seed, bits):
    W, H, grid = problem(16, 64, seed, bits=bits, scale_search="mse")
    Q = solve(W, factorize(H, activation_order(H), 0.01, 1.0, ["x"]), grid)
    solved, rounded = (float(layer_error(W, grid.dequantize(q), H).sum()) for q in (Q, grid.quantize(W)))
    assert solved < 0.8 * rounded


def test_rows_do_not_meet():
    W, H, grid = problem(12, 40)
    factor = factorize(H, activation_order(H), 0.01, 1.0, ["x"])
    whole = solve(W, factor, grid)
    for rows in (slice(0, 1), slice(3, 9)):
        part = solve(W[rows], factor, type(grid)(grid.scale[rows], grid.zero[rows], 3, 8, True))
        assert int(part.ne(whole[rows]).sum()) <= ties(part)


def test_diagonal_hessian_is_rounding():
    W, _, grid = problem(6, 32)
    factor = factorize(torch.eye(32), torch.arange(32), 0.01, 1.0, ["x"])
    assert torch.equal(solve(W, factor, grid), grid.quantize(W))


def test_points_of_the_grid_stay():
    W, H, grid = problem(6, 32)
    W = grid.dequantize(grid.quantize(W))
    assert torch.equal(grid.dequantize(solve(W, factorize(H, activation_order(H), 0.01, 1.0, ["x"]), grid)), W)


def test_inputs_are_left_alone():
    W, H, grid = problem(3, 16)
    before = W.clone(), H.clone()
    solve(W, factorize(H, activation_order(H), 0.01, 1.0, ["x"]), grid)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


def test_activation_order_is_stable():
    H = torch.diag(torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0]))
    assert activation_order(H).tolist() == [1, 3, 4, 0, 2]
